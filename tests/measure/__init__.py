"""Measure on a real GPU what memfit predicts: ``PYTHONPATH=tests:. python -m measure`` (docs/validation/gpu.md)."""

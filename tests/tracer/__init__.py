"""An op-level tracer of training memory: real model and FSDP code, tensors without data (docs/validation/tracer.md)."""

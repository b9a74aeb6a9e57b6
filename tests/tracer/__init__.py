"""An op-level tracer of training memory: real model and FSDP code on tensors without data. See docs/validation/tracer.md."""

"""What memfit needs to know about the accelerators of one launch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of accelerator in its node. Sizes are bytes of one device unless the name says otherwise."""

    name: str
    """Name of the file in ``conf/hardware`` (``h200``), or the product name where no file matches."""
    product: str
    """Product name as the driver reports it (``NVIDIA H200``)."""
    kind: str
    """``gpu`` or ``tpu``."""
    capacity_bytes: int
    """What one process can use at most: torch's ``total_memory`` on a GPU, the compiler's HBM limit on a TPU device."""
    held_bytes: int = 0
    """Held by other processes on the fullest device that the launch would use; 0 where that cannot be known."""
    gpus_per_node: int | None = None
    """Devices on this node that the launch can see; ``None`` where only the product is known (``hardware=a40``)."""
    nodes: int | None = None
    """Hosts of the slice or cluster; ``None`` where it is not known."""
    host_memory_bytes: int | None = None
    """Memory of one host that the launch may use (the cgroup limit counts); ``None`` where it is not known."""
    memory_bandwidth_bytes_per_s: int | None = None
    bf16_dense_flops: int | None = None
    """Dense bf16 (no sparsity) floating point operations a second; fp16 where the chip has no bf16."""
    compute_capability: str | None = None
    source: str
    """Where ``capacity_bytes`` was read, e.g. ``conf/hardware/h200.yaml`` or ``NVML, driver 570.86``."""
    warnings: tuple[str, ...] = ()
    """What a user should know about this reading: mixed kinds, a capacity that contradicts the name, assumed numbers."""

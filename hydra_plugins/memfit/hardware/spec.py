"""What memfit needs to know about the accelerators of one launch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the driver says about one visible device, or MIG slice of one. Sizes are bytes."""

    index: int
    """Place in the driver's own (PCI bus) order, which need not be CUDA's."""
    uuid: str | None
    product: str
    total_bytes: int
    """The driver's total, which no process can have whole."""
    reserved_bytes: int | None
    """Kept by the driver; ``None`` where it does not say."""
    usable_bytes: int
    """What one process can use at most."""
    held_bytes: int
    """Held by other processes at the moment of the reading."""
    compute_capability: str | None = None
    ecc: bool | None = None
    mig: bool = False
    """A MIG slice, not a whole GPU."""


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
    host_memory_bytes_per_device: int | None = None
    """Typical share of the host's memory of one device, from conf/hardware; ``None`` where there is no honest basis."""
    memory_bandwidth_bytes_per_s: int | None = None
    bf16_dense_flops: int | None = None
    """Dense bf16 (no sparsity) floating point operations a second; fp16 where the chip has no bf16."""
    compute_capability: str | None = None
    source: str
    """Where ``capacity_bytes`` was read, e.g. ``conf/hardware/h200.yaml`` or ``NVML, driver 570.86``."""
    warnings: tuple[str, ...] = ()
    """What a user should know of this reading: mixed kinds, a capacity that contradicts the name, assumed numbers."""
    devices: tuple[Device, ...] = ()
    """The readings behind a detected answer; empty where nothing was read."""

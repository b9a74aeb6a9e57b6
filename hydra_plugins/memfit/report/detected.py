"""What was detected, as lines for people."""

from __future__ import annotations

from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.hardware.spec import Device, Hardware


def lines(hardware: Hardware) -> list[str]:
    """Return the accelerator, what one process can use of it and who says so, and each device."""
    facts = {
        "usable": f"{gib(hardware.capacity_bytes)} by one process on one device",
        "held": f"{gib(hardware.held_bytes)} by other processes" if hardware.held_bytes else "",
        "devices": _count(hardware),
        "host": f"{gib(hardware.host_memory_bytes)} of memory" if hardware.host_memory_bytes else "",
        "read from": hardware.source,
    }
    return [
        f"{hardware.product} ({hardware.name})",
        *(f"  {label:<10}{text}" for label, text in facts.items() if text),
        *(f"  {_device(device)}" for device in hardware.devices),
        *(f"  warning: {warning}" for warning in hardware.warnings),
    ]


def _count(hardware: Hardware) -> str:
    if hardware.gpus_per_node is None:
        return ""
    nodes = f" on each of {hardware.nodes} hosts" if (hardware.nodes or 1) > 1 else " on this host"
    return f"{hardware.gpus_per_node}{nodes}"


def _device(device: Device) -> str:
    kind = "MIG slice" if device.mig else "device"
    held = f", {gib(device.held_bytes)} held by others" if device.held_bytes else ""
    uuid = f", {device.uuid}" if device.uuid else ""
    return f"{kind} {device.index}: {device.product}, {gib(device.usable_bytes)} usable{held}{uuid}"

"""From a `Hardware` to the slice that libtpu can describe."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.exact.spec import Slice
from hydra_plugins.memfit.hardware.spec import Hardware


def slice_of(hardware: Hardware, devices: int) -> Slice:
    """Return the description of a slice with ``devices`` JAX devices; raises `ConfigError` when there is no such slice."""
    generation = hardware.name.partition("-")[0]
    known = _topologies()
    if hardware.kind != "tpu" or generation not in known:
        raise ConfigError(
            f"the TPU compiler cannot be asked about {hardware.name}; it knows slices of {', '.join(known)}."
        )
    facts = known[generation]
    if devices not in facts["shapes"]:
        sizes = ", ".join(map(str, facts["shapes"]))
        raise ConfigError(f"there is no {generation} slice of {devices} devices to compile for; sizes: {sizes}.")
    bounds = facts.get("single_host", {}).get(devices, facts["chips_per_host"])
    return Slice(
        topology=f"{generation}:{facts['shapes'][devices]}",
        chip_config=facts["chip_config"],
        chips_per_host=tuple(bounds),
        devices=devices,
        capacity_bytes=hardware.capacity_bytes,
    )


@cache
def _topologies() -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "topologies.yaml").read_text())
    return content

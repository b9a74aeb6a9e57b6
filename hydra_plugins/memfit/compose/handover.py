"""One reading of the hardware for every process of a launch.

A launch composes its config in several processes (AReaL: launcher, servers, trainer ranks, restarts), each of which may
see other devices and other free memory. The first one that detects hands what it read to its children in
``MEMFIT_DETECTED``. The variable dies with the process that set it, so that a later launch from the same shell reads
anew; a process that sees other devices than when it wrote the variable reads anew, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, replace
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.hardware.spec import Device, Hardware

VARIABLE = "MEMFIT_DETECTED"
_ASKED = "MEMFIT_HARDWARE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_COUNTS = ("capacity_bytes", "held_bytes", "gpus_per_node", "nodes", "host_memory_bytes")


def hardware_of(
    node: Any, changed: frozenset[str], environ: MutableMapping[str, str], ray_address: str | None = None
) -> Hardware:
    """Return the hardware of the plain ``memfit.hardware`` node; ``changed``: the keys that the user set in it.

    ``ray_address``: the Ray cluster that the launch's own config names.

    Raises `ConfigError`, `UnknownName` or `HardwareNotDetected`. Sets `VARIABLE` in ``environ`` when it detects.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("name"), str):
        raise ConfigError(f"memfit.hardware is {node!r}; it must come from a hardware group, e.g. +hardware=auto.")
    if node["name"] == "auto":
        return _with_counts(_detected(environ, ray_address), node)
    from hydra_plugins.memfit.hardware.catalog import from_mapping, source

    own = ", ".join(sorted(key.removeprefix("memfit.hardware.") for key in changed))
    changes = f", but {own} from the command line" if own else ""
    return from_mapping(node, f"{source(node['name'])}{changes}")


def _detected(environ: MutableMapping[str, str], ray_address: str | None) -> Hardware:
    handed = _handed_down(environ)
    if handed is not None:
        return handed
    from hydra_plugins.memfit.hardware.resolve import resolve

    hardware = resolve("auto", environ=environ, ray_address=ray_address)
    environ[VARIABLE] = json.dumps({**_reader(environ), "hardware": asdict(hardware)})
    return hardware


def _reader(environ: Mapping[str, str]) -> dict[str, Any]:
    return {"pid": os.getpid(), "asked": environ.get(_ASKED), "visible": environ.get(_VISIBLE)}


def _handed_down(environ: Mapping[str, str]) -> Hardware | None:
    """Return what a parent process, or this one before, detected for the same question; ``None``: detect."""
    if VARIABLE not in environ:
        return None
    try:
        written = json.loads(environ[VARIABLE])
        hardware = _hardware(written["hardware"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{VARIABLE} cannot be read ({error}). memfit sets it for the processes of one launch: unset {VARIABLE}."
        ) from error
    reader = _reader(environ)
    same_devices = written["pid"] != reader["pid"] or written["visible"] == reader["visible"]
    return hardware if written["asked"] == reader["asked"] and same_devices else None


def _hardware(fields: Mapping[str, Any]) -> Hardware:
    devices = tuple(Device(**device) for device in fields["devices"])
    return Hardware(**{**fields, "warnings": tuple(fields["warnings"]), "devices": devices})


def _with_counts(hardware: Hardware, node: Mapping[str, Any]) -> Hardware:
    """Return ``hardware`` with what the user set in the node beside ``name: auto``."""
    given = {key: node[key] for key in _COUNTS if node.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"memfit.hardware.{key} is {value!r}; it must be a whole number of at least 0, or null.")
    if not given:
        return hardware
    return replace(hardware, **given, source=f"{hardware.source}, but {', '.join(given)} from the command line")

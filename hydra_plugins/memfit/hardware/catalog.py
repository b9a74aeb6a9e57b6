"""The accelerators of ``conf/hardware``: one file a product, a source beside each number."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.hardware.slices import parse_slice
from hydra_plugins.memfit.hardware.spec import Hardware

AUTO = "auto"
KINDS = ("gpu", "tpu")
HINT = (
    "An accelerator without a file: take the nearest name and say what one process can use, "
    "e.g. +hardware=h100 memfit.hardware.capacity_bytes=84930461696."
)
_MIN_CAPACITY = GIB
_MAX_CAPACITY = 4096 * GIB
_NUMBERS = (
    "capacity_bytes",
    "held_bytes",
    "gpus_per_node",
    "nodes",
    "host_memory_bytes",
    "host_memory_bytes_per_device",
    "memory_bandwidth_bytes_per_s",
    "bf16_dense_flops",
    "fp16_dense_flops",
    "chips",
    "hosts",
    "devices_per_host",
)
_FACTS_ONLY = ("nvml_names", "capacity_range_bytes", "nvml_total_bytes", "typical_gpus_per_node", "sources")
_SHAPES: tuple[tuple[str, type, str], ...] = (
    ("sources", Mapping, "a section of sources"),
    ("capacity_range_bytes", Sequence, "a list of two numbers"),
    ("warnings", Sequence, "a list of sentences"),
)
_KEYS = frozenset((*_NUMBERS, *_FACTS_ONLY, *(f.name for f in fields(Hardware))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The part of a file that only detection needs."""

    name: str
    nvml_names: tuple[str, ...]
    capacity_range_bytes: tuple[int, int]
    """Smallest and largest capacity that processes printed, over drivers."""
    nvml_total_bytes: int | None
    """The driver's own total, where a reading is known."""
    capacity_kind: str
    """How well the capacity is known: ``measured``, ``observed``, ``derived`` or ``assumed``."""


@cache
def names() -> tuple[str, ...]:
    """Return the known names, sorted. ``auto`` is not one of them."""
    return tuple(sorted(path.stem for path in _directory().glob("*.yaml") if path.stem != AUTO))


@cache
def load(name: str) -> Hardware:
    """Return the accelerator of ``conf/hardware/<name>.yaml``, or a TPU slice of a known generation; raises `UnknownName`."""
    return from_mapping(node(name), source(name))


def source(name: str) -> str:
    """Return the file that the facts of a name come from, as people read it."""
    relative = None if name in names() else _of_generation(name)
    return f"conf/hardware/{relative or name}.yaml"


def node(name: str) -> dict[str, Any]:
    """Return the ``memfit.hardware`` node of a name, as a hardware group composes it; raises `UnknownName`.

    A TPU slice without a file (``v4-32``) has the devices of its generation and its own number of them.
    """
    if name in names():
        return _read(name)
    size, relative = parse_slice(name), _of_generation(name)
    if size is None or relative is None:
        raise UnknownName("hardware", name, names(), HINT)
    counts = {"chips": size.chips, "hosts": size.hosts, "devices_per_host": size.chips // size.hosts}
    return {**_read(relative), "name": size.name, **counts}


def _of_generation(name: str) -> str | None:
    """Return a file of the same TPU generation: a device is the same in all of its slices."""
    size = parse_slice(name)
    return next((known for known in names() if size and known.startswith(f"{size.generation}-")), None)


@cache
def facts(name: str) -> Facts:
    """Return what detection needs of a file that exists."""
    node = _read(name)
    low, high = node.get("capacity_range_bytes") or (node["capacity_bytes"],) * 2
    return Facts(
        name=name,
        nvml_names=tuple(node.get("nvml_names") or ()),
        capacity_range_bytes=(low, high),
        nvml_total_bytes=node.get("nvml_total_bytes"),
        capacity_kind=node["sources"]["capacity_bytes"]["kind"],
    )


@cache
def by_product(nvml_name: str) -> str | None:
    """Return the name of the file that lists exactly this driver's product name, else ``None``.

    Names are compared whole: "NVIDIA A10" is neither an A100 nor an A10G. Only files that contain the text are parsed.
    """
    for name in names():
        text = (_directory() / f"{name}.yaml").read_text(encoding="utf-8")
        if f'"{nvml_name}"' in text and nvml_name in facts(name).nvml_names:
            return name
    return None


def from_mapping(node: Mapping[str, Any], source: str) -> Hardware:
    """Return the `Hardware` of a ``memfit.hardware`` node, e.g. of a composed config with the user's overrides.

    Raises `ConfigError`, which names the key, what is wrong with it and a value that would do.
    """
    values = {str(key): node[key] for key in node}
    _check_keys(values, source)
    _check_shapes(values, source)
    for key in _NUMBERS:
        _check_int(values, key, source)
    capacity = _capacity(values, source)
    name = _text(values, "name", source) or "custom"
    return Hardware(
        name=name,
        product=_text(values, "product", source) or name,
        kind=_kind(values, source),
        capacity_bytes=capacity,
        held_bytes=values.get("held_bytes") or 0,
        gpus_per_node=_first(values, "gpus_per_node", "devices_per_host"),
        nodes=_first(values, "nodes", "hosts"),
        host_memory_bytes=values.get("host_memory_bytes"),
        host_memory_bytes_per_device=values.get("host_memory_bytes_per_device"),
        memory_bandwidth_bytes_per_s=values.get("memory_bandwidth_bytes_per_s"),
        bf16_dense_flops=_first(values, "bf16_dense_flops", "fp16_dense_flops"),
        compute_capability=_text(values, "compute_capability", source),
        source=source,
        warnings=tuple(_assumptions(name, values)),
    )


def _directory() -> Path:
    return conf_dir() / "hardware"


def _read(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf  # lazy: a launch with another +hardware= file has it loaded, a formula has not

    path = _directory() / f"{name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    node = content.get("memfit", {}).get("hardware") if isinstance(content, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{path} has no mapping memfit.hardware.")
    return {str(key): value for key, value in node.items()}


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"memfit.hardware.{unknown[0]} is not a key of a hardware file ({source}).{guess}")


def _check_shapes(values: Mapping[str, Any], source: str) -> None:
    for key, shape, valid in _SHAPES:
        value = values.get(key)
        if value and (isinstance(value, str) or not isinstance(value, shape)):
            raise ConfigError(f"memfit.hardware.{key}={value!r} is not {valid} ({source}).")
    entry = (values.get("sources") or {}).get("capacity_bytes") or {}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"memfit.hardware.sources.capacity_bytes={entry!r} is not a section ({source}).")


def _check_int(values: Mapping[str, Any], key: str, source: str) -> None:
    value = values.get(key)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"memfit.hardware.{key}={value!r} is not an integer ({source}). Write it plainly, without unit or exponent."
        )
    least = 0 if key == "held_bytes" else 1
    if value < least:
        raise ConfigError(f"memfit.hardware.{key}={value} must be at least {least} ({source}).")


def _capacity(values: Mapping[str, Any], source: str) -> int:
    capacity = values.get("capacity_bytes")
    if capacity is None:
        raise ConfigError(
            f"memfit.hardware.capacity_bytes is missing ({source}). It is the most that one process can use, in bytes: "
            "what torch prints as total_memory, not the GB on the box."
        )
    if not _MIN_CAPACITY <= capacity <= _MAX_CAPACITY:
        raise ConfigError(
            f"memfit.hardware.capacity_bytes={capacity} is not the memory of an accelerator in bytes ({source}): "
            f"1 GiB is {GIB}, 80 GiB are {80 * GIB}."
        )
    return int(capacity)


def _text(values: Mapping[str, Any], key: str, source: str) -> str | None:
    value = values.get(key)
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"memfit.hardware.{key}={value!r} is not text ({source}). Quote it.")


def _kind(values: Mapping[str, Any], source: str) -> str:
    kind = values.get("kind", "gpu")
    if kind not in KINDS:
        raise ConfigError(f"memfit.hardware.kind={kind!r} is neither of {', '.join(KINDS)} ({source}).")
    return str(kind)


def _first(values: Mapping[str, Any], *keys: str) -> int | None:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _assumptions(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user should know; a capacity that he set himself is not an assumption of the file."""
    entry = (values.get("sources") or {}).get("capacity_bytes") or {}
    of_file = values["capacity_bytes"] in (values.get("capacity_range_bytes") or (values["capacity_bytes"],))
    if entry.get("kind") == "assumed" and of_file:
        yield f"the capacity of {name} is assumed, not measured: {entry.get('note')}"
    yield from values.get("warnings") or ()

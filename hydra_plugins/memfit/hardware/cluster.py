"""What Slurm and Ray have in common: names of GPU types, and several nodes as one answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.hardware.spec import Hardware

_WORDS = re.compile(r"[a-z]+\d+[a-z]*|\d+g?i?b?|[a-z]+")
_SIZE = re.compile(r"(\d+)g?i?b?")
_BRANDS = frozenset(("nvidia", "geforce", "tesla", "rtx"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of a cluster, as its scheduler or its own driver describes it."""

    name: str
    hardware: Hardware
    """``gpus_per_node`` and ``host_memory_bytes`` are this node's."""


def candidates(gpu_type: str, hints: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the files of ``conf/hardware`` that a scheduler's name for a GPU may mean, sorted.

    ``gpu_type`` is free text of an administrator (``a100``, ``nvidia_h100_80gb_hbm3``) or Ray's ``A100-80G``; ``hints`` are a
    node's features, which only break ties between sizes. Empty: none; several: the name does not say which.
    """
    product = _product(gpu_type)
    if product is not None:
        return (product,)
    words = [word for word in _words(gpu_type) if word not in _BRANDS]
    found = [name for name in catalog.names() if catalog.load(name).kind == "gpu" and _means(words, name)]
    sized = [name for name in found if _size(name) in {_size(word) for word in (*words, *_flat(hints))}]
    if len(found) > 1 and len(sized) == 1:
        return tuple(sized)
    return tuple([name for name in found if name in words] or found)  # h100 is h100, though h100-nvl exists


def smallest(nodes: Sequence[Node], *, source: str) -> Hardware:
    """Return one answer for all ``nodes``, at least one: the smallest device, count and host memory of any of them."""
    least = min(nodes, key=lambda node: node.hardware.capacity_bytes)
    counts = [n.hardware.gpus_per_node for n in nodes if n.hardware.gpus_per_node is not None]
    hosts = [n.hardware.host_memory_bytes for n in nodes if n.hardware.host_memory_bytes is not None]
    said = tuple(dict.fromkeys((*_mixed(nodes, least), *(w for n in nodes for w in n.hardware.warnings))))
    return replace(
        least.hardware,
        held_bytes=max(node.hardware.held_bytes for node in nodes),
        gpus_per_node=min(counts, default=None),
        nodes=len(nodes),
        host_memory_bytes=min(hosts, default=None),
        source=source,
        warnings=said,
    )


def listed(gpu_type: str, hints: Iterable[str], *, where: str, variable: str) -> Hardware:
    """Return the file that ``gpu_type`` means; raises `HardwareNotDetected` where none or several may be meant."""
    found = candidates(gpu_type, hints)
    if len(found) == 1:
        return catalog.load(found[0])
    either = f"may be {' or '.join(found)}" if found else "is no accelerator that memfit knows"
    valid = " or ".join(f"{variable}={name}" for name in found) or f"{variable}=<name>"
    raise HardwareNotDetected(f"{where} calls its GPUs {gpu_type!r}, which {either}: say {valid}.")


def _product(text: str) -> str | None:
    """Return the file whose driver's product name is ``text``, written as schedulers do: lower case, underscores."""
    plain = text.lower().replace("_", " ").replace("-", " ")
    for name in catalog.names():
        products = catalog.facts(name).nvml_names
        if plain in (product.lower().replace("-", " ") for product in products):
            return name
    return None


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _means(words: Sequence[str], name: str) -> bool:
    """Whether a file's name starts with the chip among ``words``; a size that both have must agree."""
    chip, *rest = name.split("-")
    chips = {word for word in words if not _SIZE.fullmatch(word)}
    if not chips & {chip, chip.removeprefix("rtx")} and chip.removeprefix("rtx") not in words:
        return False
    said = {_size(word) for word in words if _SIZE.fullmatch(word) and word != chip.removeprefix("rtx")}
    return not rest or not said or _size(name) in said


def _size(text: str) -> int | None:
    """Return the gigabytes that a name ends with: 80 of ``a100-80`` and of ``80gb``."""
    found = _SIZE.fullmatch(text.rpartition("-")[2].lower())
    return int(found[1]) if found else None


def _flat(hints: Iterable[str]) -> list[str]:
    return [word for hint in hints for word in _words(hint)]


def _mixed(nodes: Sequence[Node], least: Node) -> list[str]:
    kinds = {node.hardware.product: node.hardware for node in nodes}
    if len(kinds) < 2:
        return []
    said = ", ".join(f"{product} with {gib(hardware.capacity_bytes)}" for product, hardware in kinds.items())
    return [f"nodes of several kinds: {said}. The smallest counts for all: {least.hardware.product} ({least.name})"]

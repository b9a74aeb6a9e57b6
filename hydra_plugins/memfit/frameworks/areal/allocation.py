"""AReaL's layout strings: ``sglang.d4p1t1+d4p1t1``, ``sglang:d4t2+fsdp:d8c2``, ``vllm:d2t4``, ``fsdp:d4``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled

ENGINES = ("sglang", "vllm")
TRAINERS = ("fsdp", "megatron", "archon")
EXAMPLE = "allocation_mode=sglang:d1+fsdp:d1"

_PART = re.compile(r"(?:(?P<name>[a-z]+)[.:])?(?P<dims>(?:[dtpce]\d+)+)")
_DIM = re.compile(r"([dtpce])(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One side of a layout: data, tensor, pipeline and context (sequence) parallel sizes."""

    name: str
    d: int = 1
    t: int = 1
    p: int = 1
    c: int = 1

    @property
    def world(self) -> int:
        """GPUs of this side."""
        return self.d * self.t * self.p * self.c


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Who runs on how many GPUs."""

    server: Part | None
    trainer: Part
    colocated: bool = False
    """Both sides name the same GPUs (``|``)."""


def part(text: str, key: str, names: tuple[str, ...], default: str) -> Part:
    """Return one side; raises `ConfigError` for what is no layout and `NotModelled` for a trainer that is not modelled."""
    text = text.strip()
    name = re.split(r"[.:]", text, maxsplit=1)[0]
    if name in ("megatron", "archon") and name in names:
        raise _not_modelled(key, text, name)
    found = _PART.fullmatch(text)
    if text in names:
        return Part(name=text)
    if found is None or (found["name"] or default) not in names:
        raise ConfigError(
            f"{key}={text!r} is not a layout of {' or '.join(names)}: sizes are written as d4p1t1 (data, pipeline, tensor; "
            f"c: context), for example {EXAMPLE}, rollout.backend=sglang:d1 or actor.backend=fsdp:d1."
        )
    sizes = {letter: int(size) for letter, size in _DIM.findall(found["dims"])}
    if 0 in sizes.values():
        raise ConfigError(f"{key}={text!r}: a size of 0. The smallest is 1, for example d1p1t1.")
    if sizes.pop("e", 1) > 1 and default == "fsdp":
        raise _not_modelled(key, text, "expert parallel training")
    return Part(name=found["name"] or default, **sizes)


def trainer(text: str, key: str) -> Part:
    """Return the trainer's side, which must be one that the memory model covers."""
    side = part(text, key, TRAINERS, "fsdp")
    if side.p > 1:
        raise _not_modelled(key, text, "pipeline parallel training (AReaL takes Megatron for it)")
    if side.t > 1:
        raise _not_modelled(key, text, "tensor parallel training")
    return side


def mode(text: str) -> Layout:
    """Return what ``allocation_mode`` says."""
    key = "allocation_mode"
    joined = "|" in text and "(" not in text
    sides = re.split(r"[+|]", text) if "(" not in text else text.split("+")
    if len(sides) > 2 or not all(side.strip() for side in sides):
        raise ConfigError(f"{key}={text!r} must name one trainer, or a server and a trainer, for example {EXAMPLE}.")
    if len(sides) == 1:
        if re.split(r"[.:]", text.strip(), maxsplit=1)[0] in ENGINES:
            raise NotModelled(f"{key}={text}: a launch of servers alone has no trainer to plan for.")
        return Layout(server=None, trainer=trainer(sides[0], key))
    server = part(sides[0], key, ENGINES, "sglang")
    return Layout(server=server, trainer=trainer(sides[1], key), colocated=joined)


def _not_modelled(key: str, text: str, what: str) -> NotModelled:
    return NotModelled(
        f"{key}={text}: {what} is not modelled; memfit models AReaL's FSDP engine with data and sequence parallel sizes "
        "(fsdp:d8, fsdp:d4c2). Launch without the hardware group, or go on unplanned with memfit.strict=false."
    )

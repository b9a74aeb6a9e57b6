"""Kinds of knobs that several frameworks have under other keys: flags that save memory, and what changes training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.planning.problem import Knob

_SHORTEST = 64
"""Tokens below which a length is not cut: nothing would be left to learn from."""


def switch(view: View, key: str, *, cost: int, why: str, default: bool = False, back: bool = False) -> Iterator[Knob]:
    """Yield a flag that saves memory when it is on; ``back``: where it is on, off is faster and memfit may choose it."""
    on = view.flag(key, default)
    if not on or back:
        fast = (False,) if on else ()
        yield Knob(key=key, requested=view.requested(key), candidates=(True,), cost=cost, why=why, fast=fast)


def host_policy(view: View, key: str, *, cost: int, whose: str, follow: Mapping[str, object]) -> Knob:
    """Return the switch that keeps everything trained on the host; ``follow``: values that it needs beside it."""
    why = f"{whose}parameters, gradients and optimizer live on the host, and the optimizer step runs there"
    return Knob(
        key=key,
        requested=view.requested(key),
        candidates=(True,),
        cost=cost,
        why=why,
        companions=lambda value: follow if value else {},
    )


def bf16_states(view: View, key: str, *, what: str = "parameters, gradients and moments") -> Knob:
    """Return the change of training that stores what the optimizer holds in bf16."""
    why = f"{what} in bf16: half the memory, coarser updates"
    return Knob(key=key, requested=view.requested(key), candidates=("bfloat16",), cost=80, kind="semantic", why=why)


def shorter(
    view: View,
    key: str,
    now: int,
    *,
    why: str,
    companions: Callable[[object], Mapping[str, object]] | None = None,
    companions_required: bool = True,
) -> Iterator[Knob]:
    """Yield the change of training that cuts a length of ``now`` tokens to three quarters, a half or a quarter."""
    lengths = tuple(length for length in (now * 3 // 4, now // 2, now // 4) if length >= _SHORTEST)
    if lengths:
        yield Knob(
            key=key,
            requested=view.requested(key),
            candidates=lengths,
            cost=90,
            kind="semantic",
            why=why,
            companions=companions,
            companions_required=companions_required,
        )

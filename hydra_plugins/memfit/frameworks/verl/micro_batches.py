"""The micro-batches of verl's passes as knobs: sequences for each GPU, or a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from hydra_plugins.memfit.base.units import ceil_div, round_up
from hydra_plugins.memfit.frameworks.verl import batches
from hydra_plugins.memfit.frameworks.verl.batches import PassKeys
from hydra_plugins.memfit.frameworks.verl.launch import REF, Launch
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.planning.problem import Knob

_MOST_SEQUENCES = 64
"""Whole sequences that a lowered soft budget holds at most: more in one micro-batch make no step faster."""

_FORWARD = "fewer tokens in a micro-batch of the log-probabilities"
_UPDATE = "fewer tokens in a micro-batch of the update"
_CRITIC = "fewer tokens in a micro-batch of the critic"
_WHY = {
    batches.OLD_LOG_PROB: (20, _FORWARD),
    batches.REF_LOG_PROB: (21, _FORWARD),
    batches.UPDATE_ACTOR: (22, f"{_UPDATE}; gradients are accumulated over more of them"),
    batches.UPDATE_CRITIC: (23, _CRITIC),
    batches.VALUES: (23, _CRITIC),
    batches.SCORES: (23, "fewer tokens in a micro-batch of the reward model"),
}
"""Cost and reason of each pass, in the order in which they are spent."""


def micro_batches(view: View, launch: Launch) -> Iterator[Knob]:
    """Yield the knobs of the passes that a step takes."""
    active = batches.active(view, launch)
    for name, (cost, why) in _WHY.items():
        shared = name == batches.VALUES and launch.behaviour.critic_single_budget
        if name in active and not shared and (name != batches.REF_LOG_PROB or view.section(REF)):
            keys = batches.pass_keys(name, launch)
            yield from batch_knobs(view, keys, batches.batch(view, launch, name), cost, why)


def batch_knobs(view: View, keys: PassKeys, batch: Batch, cost: int, why: str) -> Iterator[Knob]:
    """Yield the knobs of one pass: its token budget, or its sequences for each GPU."""
    if batch.dynamic:
        yield from _budget_knobs(view, keys.budget_key, batch, cost, why)
        return
    per_gpu, whole = f"{keys.micro_key}_per_gpu", keys.micro_key
    uses_whole = view.optional_integer(per_gpu) is None and view.optional_integer(whole) is not None
    key, unit = (whole, _whole_over_local(view, whole, batch)) if uses_whole else (per_gpu, 1)
    sizes = divisors(batch.local_sequences)
    updates = uses_whole and keys.micro.startswith("ppo")
    mini = view.optional_integer(f"{keys.section}.ppo_mini_batch_size") if updates else None
    if mini is not None:  # verl counts prompts here, not the sequences that they become
        sizes = [d for d in sizes if mini % (d * unit) == 0]
    now = batch.micro_batch
    candidates = tuple(d * unit for d in sizes if now is None or d < now)
    fast = tuple(d * unit for d in sizes if now is not None and d > now)
    if candidates or fast:
        yield Knob(
            key=key,
            requested=view.requested(key),
            candidates=candidates,
            cost=cost,
            why=why if now is not None else "verl needs a value: the largest micro-batch that fits",
            required=now is None,
            fast=fast,
        )


def _whole_over_local(view: View, key: str, batch: Batch) -> int:
    """How many ranks share the deprecated global micro-batch."""
    return max(1, (view.optional_integer(key) or 1) // max(1, batch.micro_batch or 1))


def _budget_knobs(view: View, key: str, batch: Batch, cost: int, why: str) -> Iterator[Knob]:
    floor = ceil_div(batch.max_length, batch.sequence_parallel)
    now = batch.budget
    requested = view.requested(key)
    whole = batch.local_sequences * batch.max_length // batch.sequence_parallel
    cheap = tuple(dict.fromkeys(value for value in _steps(now, floor, batch) if 2 * floor <= value < now))
    tight = tuple(dict.fromkeys(value for value in _steps(now, floor, batch) if floor <= value < min(now, 2 * floor)))
    fast = tuple(v for v in (16 * floor, 8 * floor, 4 * floor, 3 * floor, 2 * floor) if now < v <= max(whole, now))
    if cheap or fast:
        yield Knob(key=key, requested=requested, candidates=cheap, cost=cost, why=why, fast=fast)
    if tight:
        yield Knob(key=key, requested=requested, candidates=tight, cost=cost + 6, why=why)


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, largest first."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def _steps(now: int, floor: int, batch: Batch) -> list[int]:
    """Budgets from ``now`` down to ``floor``; where the budget is soft, whole sequences only."""
    if not batch.hard_budget:
        return [k * floor for k in range(min(now // floor, _MOST_SEQUENCES), 0, -1)]
    step = max(64, round_up((now - floor) // 48, 64))
    return [*range(now - now % 64, floor, -step), floor]

"""An engine's share of one GPU: the fraction to choose where one may be chosen, and the margin that stays beside it."""

from __future__ import annotations

import math

from hydra_plugins.memfit.base.units import MIB, gib
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import Shortfall
from hydra_plugins.memfit.memory.engine import Engine, Pool

LARGEST_FRACTION = 0.95
_SMALLEST_MARGIN = 0.01
"""Share of the capacity that stays free beside an engine's share: contexts and communicators are not known better."""
_UNCERTAIN_KV_BYTES = 256 * MIB
"""A share that the user asked for is refused only when it is short by more than the engine's workspace is known."""
_FRACTION_STEP = 0.01
"""A solved fraction is rounded down to this: verl's own scripts use steps of 0.05 and 0.1."""


def solved_fraction(engine: Engine, pool: Pool, *, largest: float) -> float:
    """Return the fraction closest to the requested one that holds the longest sequence, and is not above ``largest``."""
    base = max(1, pool.base)
    lowest = _ceil((pool.inside + engines.minimum_kv_bytes(engine)) / base)
    useful = _ceil((pool.inside + engines.useful_kv_bytes(engine)) / base)
    wanted = engine.requested_fraction
    if wanted is None or wanted < lowest:
        wanted = max(useful, lowest)
    elif engine.at_least_useful:
        wanted = max(useful, wanted)
    return max(min(wanted, _floor(largest)), _FRACTION_STEP)


def _ceil(value: float) -> float:
    return round(math.ceil(value / _FRACTION_STEP - 1e-9) * _FRACTION_STEP, 4)


def _floor(value: float) -> float:
    return round(math.floor(value / _FRACTION_STEP + 1e-9) * _FRACTION_STEP, 4)


def budget_beside(fraction: float | None, *, capacity: int, held: int, budget: int) -> int:
    """
    Return the budget in bytes of a phase with the engine awake.

    A share that was asked for is a fact and not a prediction, so the margin is kept on the rest of the device alone.
    ``fraction`` is ``None`` where the share was chosen or there is no engine: the whole margin.
    """
    if fraction is None:
        return budget
    margin = max(0, capacity - held - budget)
    needed = max(int(margin * (1 - fraction)), int(_SMALLEST_MARGIN * capacity))
    return capacity - held - min(margin, needed)


def kv_shortfalls(engine: Engine, kv: int, *, whose: str = "engine") -> tuple[Shortfall, ...]:
    """Return what a pool of ``kv`` bytes lacks for one sequence of the longest length, if anything."""
    need = engines.minimum_kv_bytes(engine)
    if kv > 0 and kv >= need - (_UNCERTAIN_KV_BYTES if engine.fraction is not None else 0):
        return ()
    why = (
        f"the {whose}'s share leaves {gib(max(0, kv))} for the KV cache; one sequence of {engine.max_model_len} tokens "
        f"needs {gib(need)}"
    )
    return (Shortfall(phase="launch", num_bytes=need - kv, why=why),)

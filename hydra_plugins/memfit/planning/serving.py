"""Generation alone: an inference engine that is started, fed and stopped, beside what its worker keeps on the same GPU.

This is the calendar of a launch without a trainer's step. The formulas are in ``memory``; the keys that lead here are in
``frameworks``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hydra_plugins.memfit.base.units import MIB, gib
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate, Shortfall
from hydra_plugins.memfit.memory.engine import Engine, Pool
from hydra_plugins.memfit.memory.trainer import peak

_SMALLEST_MARGIN = 0.01
"""Share of the capacity that stays free beside an engine's share: contexts and communicators are not known better."""
_UNCERTAIN_KV_BYTES = 256 * MIB
"""A share that the user asked for is refused only when it is short by more than the engine's workspace is known."""
_FRACTION_STEP = 0.01
_LARGEST_FRACTION = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingRun:
    """One launch that generates and does not train, as the framework's adapter read it."""

    capacity_bytes: int
    budget_bytes: int
    """Capacity less the margin and less what others hold."""
    held_bytes: int = 0
    host_peak_bytes: int = 0
    host_budget_bytes: int = 0
    """0 where the host's memory is not known."""
    engine: Engine
    beside: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """What the worker keeps on the GPU beside the engine, from before it starts until the end."""
    handover: tuple[MemoryBreakdown, ...] = ()
    """Moments of the worker handing its weights to the engine, on top of ``beside``; empty: the engine loads its own."""
    fraction_key: str
    """Config key of the engine's fraction, for `Estimate.solved`."""


def estimate(run: ServingRun) -> Estimate:
    """Return the predicted peak of the start, of the weights' handover if there is one, and of generation."""
    fraction = run.engine.fraction if run.engine.fraction is not None else _solved(run)
    kv, need = _pool(run).kv_bytes(fraction), engines.minimum_kv_bytes(run.engine)
    awake = engines.awake(run.engine, kv=kv)
    budget = _budget_awake(run, fraction)
    phases = [_phase(run, "launch", run.beside, awake, budget)]
    if run.handover:
        sending = run.beside + peak(run.handover)
        phases.append(_phase(run, "weight_sync", sending, engines.receiving(run.engine, kv=kv), run.budget_bytes))
    phases.append(_phase(run, "generate", run.beside, awake, budget))
    return Estimate(
        phases=tuple(phases),
        host=HostEstimate(peak_bytes=run.host_peak_bytes, budget_bytes=run.host_budget_bytes),
        shortfalls=_shortfall(run, kv, need),
        solved=() if run.engine.fraction is not None else ((run.fraction_key, fraction),),
    )


def _pool(run: ServingRun) -> Pool:
    return engines.pool(run.engine, capacity=run.capacity_bytes, trainer_at_launch=run.beside.total_bytes)


def _solved(run: ServingRun) -> float:
    """The fraction closest to the requested one that holds the longest sequence and stays within the budget."""
    engine, pool = run.engine, _pool(run)
    base = max(1, pool.base)
    lowest = _ceil((pool.inside + engines.minimum_kv_bytes(engine)) / base)
    useful = _ceil((pool.inside + engines.useful_kv_bytes(engine)) / base)
    wanted = engine.requested_fraction
    if wanted is None or wanted < lowest:
        wanted = max(useful, lowest)
    elif engine.at_least_useful:
        wanted = max(useful, wanted)
    return max(min(wanted, _largest(run, pool)), _FRACTION_STEP)


def _largest(run: ServingRun, pool: Pool) -> float:
    """The largest fraction with which everything on the GPU stays within the budget."""
    beside = 0 if run.engine.share_of == "device" else run.beside.total_bytes
    share = (run.budget_bytes - beside - pool.outside) / max(1, pool.base)
    return min(round(math.floor(share / _FRACTION_STEP + 1e-9) * _FRACTION_STEP, 4), _LARGEST_FRACTION)


def _ceil(value: float) -> float:
    return round(math.ceil(value / _FRACTION_STEP - 1e-9) * _FRACTION_STEP, 4)


def _budget_awake(run: ServingRun, fraction: float) -> int:
    """The budget with the engine awake: a share that was asked for is a fact, so the margin is kept on the rest alone."""
    if run.engine.fraction is None:
        return run.budget_bytes
    margin = max(0, run.capacity_bytes - run.held_bytes - run.budget_bytes)
    needed = max(int(margin * (1 - fraction)), int(_SMALLEST_MARGIN * run.capacity_bytes))
    return run.capacity_bytes - run.held_bytes - min(margin, needed)


def _shortfall(run: ServingRun, kv: int, need: int) -> tuple[Shortfall, ...]:
    if kv >= need - (_UNCERTAIN_KV_BYTES if run.engine.fraction is not None else 0):
        return ()
    why = (
        f"the engine's share leaves {gib(max(0, kv))} for the KV cache; one sequence of {run.engine.max_model_len} tokens "
        f"needs {gib(need)}"
    )
    return (Shortfall(phase="launch", num_bytes=need - kv, why=why),)


def _phase(run: ServingRun, name: str, worker: MemoryBreakdown, engine: MemoryBreakdown, budget: int) -> PhaseEstimate:
    if run.engine.in_process:
        worker, engine = worker + engine, MemoryBreakdown()
    return PhaseEstimate(name=name, trainer=worker, engine=engine, budget_bytes=budget)

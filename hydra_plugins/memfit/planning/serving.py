"""Generation alone: an inference engine that is started, fed and stopped, beside what its worker keeps on the same GPU.

This is the calendar of a launch without a trainer's step. The formulas are in ``memory``; the keys that lead here are in
``frameworks``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.memory.engine import Engine, Pool
from hydra_plugins.memfit.memory.trainer import peak
from hydra_plugins.memfit.planning.share import LARGEST_FRACTION, budget_beside, kv_shortfalls, solved_fraction


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
    at_start: MemoryBreakdown | None = None
    """What it has there when the engine starts, where that is something else."""
    neighbours: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """Other engines on the same GPU, which start later and sleep while this one works."""
    working: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """What the engine's work takes that its own profile run has not seen."""
    handover: tuple[MemoryBreakdown, ...] = ()
    """
    Moments of the worker handing weights to the engine, on top of ``beside``; empty: none are handed over.

    A sleeping engine has no KV pool then; one that does not sleep has, and leaves room for them beside its share.
    """
    fraction_key: str
    """Config key of the engine's fraction, for `Estimate.solved`."""
    phase: str = "generate"
    """Name of the phase in which the engine works."""


def estimate(run: ServingRun) -> Estimate:
    """Return the predicted peak of the start, of the weights' handover if there is one, and of generation."""
    fraction = _fraction(run)
    kv = kv_bytes(run)
    awake = engines.awake(run.engine, kv=kv)
    budget = budget_beside(
        run.engine.fraction, capacity=run.capacity_bytes, held=run.held_bytes, budget=run.budget_bytes
    )
    phases = [_phase(run, "launch", _at_start(run), awake, budget)]
    if run.handover:
        handing = run.beside + peak(run.handover)
        room = run.budget_bytes if run.engine.sleeps else budget
        phases.append(_phase(run, "weight_sync", handing, engines.receiving(run.engine, kv=kv), room))
    phases.append(_phase(run, run.phase, run.beside, awake + run.neighbours + run.working, budget))
    return Estimate(
        phases=tuple(phases),
        host=HostEstimate(peak_bytes=run.host_peak_bytes, budget_bytes=run.host_budget_bytes),
        shortfalls=kv_shortfalls(run.engine, kv),
        solved=() if run.engine.fraction is not None else ((run.fraction_key, fraction),),
    )


def _at_start(run: ServingRun) -> MemoryBreakdown:
    return run.beside if run.at_start is None else run.at_start


def _pool(run: ServingRun) -> Pool:
    return engines.pool(run.engine, capacity=run.capacity_bytes, trainer_at_launch=_at_start(run).total_bytes)


def kv_bytes(run: ServingRun) -> int:
    """Return the engine's KV pool; negative where its share does not hold the weights."""
    return _pool(run).kv_bytes(_fraction(run))


def resident_bytes(run: ServingRun) -> int:
    """Return what lies beside the working engine."""
    return _beside_work(run).total_bytes


def _fraction(run: ServingRun) -> float:
    return run.engine.fraction if run.engine.fraction is not None else _solved(run)


def _solved(run: ServingRun) -> float:
    """The fraction closest to the requested one with which everything on the GPU stays within the budget."""
    pool = _pool(run)
    beside = 0 if run.engine.share_of == "device" else max(_at_start(run).total_bytes, _beside_work(run).total_bytes)
    if run.handover and not run.engine.sleeps:
        beside += peak(run.handover).total_bytes
    largest = (run.budget_bytes - beside - pool.outside) / max(1, pool.base)
    return solved_fraction(run.engine, pool, largest=min(largest, LARGEST_FRACTION))


def _beside_work(run: ServingRun) -> MemoryBreakdown:
    return run.beside + run.neighbours + run.working


def _phase(run: ServingRun, name: str, worker: MemoryBreakdown, engine: MemoryBreakdown, budget: int) -> PhaseEstimate:
    if run.engine.in_process:
        worker, engine = worker + engine, MemoryBreakdown()
    return PhaseEstimate(name=name, trainer=worker, engine=engine, budget_bytes=budget)

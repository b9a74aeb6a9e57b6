"""A trainer, a guest on its GPUs, and engines on GPUs of their own: the worst GPU of any pool is what is reported.

The trainer's calendar is in ``planning.colocated``, that of an engine alone in ``planning.serving``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.overheads import HOST_PROCESS_BYTES
from hydra_plugins.memfit.planning import colocated, serving
from hydra_plugins.memfit.planning.colocated import ColocatedRun
from hydra_plugins.memfit.planning.serving import ServingRun

_ORDER = ("launch", "rollout", "generate")
"""What comes before the trainer's phases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guest:
    """An engine of another model on the trainer's GPUs: it starts before the policy's, and works while all others rest."""

    engine: Engine
    worker: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """What its worker keeps on the GPU beside it."""
    fraction_key: str
    """Config key of its share, for `Estimate.solved`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledRun:
    """One launch as the framework's adapter read it; without guest and pools it is the trainer's calendar alone."""

    ranks: tuple[ColocatedRun, ...]
    """The trainer's ranks: one kind, or the pipeline stages of which one is the worst."""
    guest: Guest | None = None
    pools: tuple[ServingRun, ...] = ()
    one_host: bool = False
    """All pools share one host, and its memory."""


def estimate(run: PooledRun) -> Estimate:
    """Return the predicted peak of every phase on the GPU where it is worst, whichever pool that one is in."""
    trainer, guests = _on_one_gpu(run)
    chosen = dict(trainer.solved)
    pools = [serving.estimate(_with_share(pool, chosen)) for pool in run.pools]
    parts = [trainer, *guests, *pools]
    hosts = [part.host.peak_bytes for part in (trainer, *pools)]
    hosts[0] += sum(guest.host.peak_bytes for guest in guests)
    return Estimate(
        phases=worst(chain.from_iterable(part.phases for part in parts)),
        host=HostEstimate(
            peak_bytes=sum(hosts) if run.one_host else max(hosts), budget_bytes=trainer.host.budget_bytes
        ),
        shortfalls=tuple(chain.from_iterable(part.shortfalls for part in parts)),
        solved=tuple(dict(chain.from_iterable(part.solved for part in parts)).items()),
        notes=tuple(chain.from_iterable(part.notes for part in parts)),
    )


def _on_one_gpu(run: PooledRun) -> tuple[Estimate, list[Estimate]]:
    """The trainer's calendar, with the guest asleep; and the guest's own, beside the rank that keeps most."""
    if run.guest is None:
        return _worst_rank(run.ranks), []
    hosted = max((_hosted(run.guest, rank) for rank in run.ranks), key=serving.resident_bytes)
    asleep = run.guest.worker + engines.asleep(run.guest.engine, kv=serving.kv_bytes(hosted))
    return _worst_rank(tuple(replace(rank, guests=asleep) for rank in run.ranks)), [serving.estimate(hosted)]


def _hosted(guest: Guest, trainer: ColocatedRun) -> ServingRun:
    """The calendar of a guest: it starts beside the trainer alone, and works beside everything else at rest."""
    at_start, resting, asleep = colocated.beside_a_guest(trainer)
    copy = engines.weight_bytes(guest.engine) if guest.engine.weights_on_host else 0
    return ServingRun(
        capacity_bytes=trainer.capacity_bytes,
        budget_bytes=trainer.budget_bytes,
        held_bytes=trainer.held_bytes,
        host_peak_bytes=min(trainer.gpus_per_node, trainer.world_size) * (2 * HOST_PROCESS_BYTES + copy),
        host_budget_bytes=trainer.host_budget_bytes,
        engine=guest.engine,
        beside=resting,
        at_start=at_start,
        neighbours=guest.worker + asleep,
        fraction_key=guest.fraction_key,
    )


def _worst_rank(runs: tuple[ColocatedRun, ...]) -> Estimate:
    """
    The prediction for the trainer, each phase from the rank that needs most in it.

    The engine's share is one number for all ranks: where it is solved for, each of them must be able to give it.
    """
    parts = [colocated.estimate(run) for run in runs]
    if len(parts) == 1:
        return parts[0]
    shares = [float(value) for part in parts for _, value in part.solved]
    if shares:
        parts = [colocated.estimate(replace(run, largest_fraction=min(shares))) for run in runs]
    return replace(
        parts[0],
        phases=tuple(min(same, key=_headroom) for same in zip(*(part.phases for part in parts), strict=True)),
        host=max((part.host for part in parts), key=lambda host: host.peak_bytes),
        shortfalls=max((part.shortfalls for part in parts), key=lambda each: sum(s.num_bytes for s in each)),
    )


def _headroom(phase: PhaseEstimate) -> int:
    return phase.budget_bytes - phase.peak_bytes


def _with_share(pool: ServingRun, chosen: Mapping[str, float | int]) -> ServingRun:
    """The pool with the share that the trainer's own engine chose, where one key sets both."""
    if pool.engine.fraction is not None or pool.fraction_key not in chosen:
        return pool
    return replace(pool, engine=replace(pool.engine, fraction=float(chosen[pool.fraction_key])))


def worst(phases: Iterable[PhaseEstimate]) -> tuple[PhaseEstimate, ...]:
    """Return one phase of each name, the one with the least headroom, in the order of a step."""
    found: dict[str, PhaseEstimate] = {}
    for phase in phases:
        known = found.setdefault(phase.name, phase)
        if _headroom(phase) < _headroom(known):
            found[phase.name] = phase
    return tuple(sorted(found.values(), key=lambda phase: _ORDER.index(phase.name) if phase.name in _ORDER else 9))

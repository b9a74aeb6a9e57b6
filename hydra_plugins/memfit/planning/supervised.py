"""Supervised training alone: forward, backward and optimizer step, and nothing else on the GPU.

This is the calendar of a launch without an inference engine. States that are offloaded between steps come back for the whole
step, so offload lowers neither phase. The formulas are in ``memory``; the keys that lead here are in ``frameworks``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.memory.allocator import fragmentation_bytes
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.memory.overheads import (
    HOST_DRIVER_BYTES,
    HOST_PROCESS_BYTES,
    trainer_context_bytes,
)
from hydra_plugins.memfit.planning.roles import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedRun:
    """One launch that trains on given answers, as the framework's adapter read it."""

    budget_bytes: int
    """Capacity less the margin and less what others hold."""
    host_budget_bytes: int = 0
    """0 where the host's memory is not known."""
    world_size: int
    gpus_per_node: int
    role: Role
    expandable_segments: bool = False
    tied_load: bool = False
    """Every rank materialises the whole model on the host while loading."""


def estimate(run: SupervisedRun) -> Estimate:
    """Return the predicted peak of forward and backward, and of the optimizer step, once its states exist."""
    states = MemoryBreakdown(context=trainer_context_bytes(world_size=run.world_size)) + run.role.loaded(optimizer=True)
    update = run.role.update_pass()
    slack = fragmentation_bytes(update.total_bytes - update.gradients, expandable_segments=run.expandable_segments)
    phases = (
        _phase(run, "train_step", states + update + MemoryBreakdown(fragmentation=slack)),
        _phase(run, "optimizer_step", states + run.role.step()),
    )
    return Estimate(phases=phases, host=_host(run))


def _phase(run: SupervisedRun, name: str, trainer: MemoryBreakdown) -> PhaseEstimate:
    return PhaseEstimate(name=name, trainer=trainer, budget_bytes=run.budget_bytes)


def _host(run: SupervisedRun) -> HostEstimate:
    """Offloaded states and processes of one host; or the load, where that is more."""
    ranks = min(run.gpus_per_node, run.world_size)
    resident = ranks * run.role.host_bytes()
    load = (ranks if run.tied_load else 1) * run.role.master_bytes * run.role.model.parameters
    peak = max(resident, load) + ranks * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES
    return HostEstimate(peak_bytes=peak, budget_bytes=run.host_budget_bytes)

"""Trainer and inference server as processes of their own that run at the same time, on shared or on separate GPUs.

This is the calendar of an asynchronous run (AReaL): the server generates while the trainer trains, so on a shared GPU the
server's whole share is resident in every phase. The formulas are in ``memory``, the roles of the trainer in
``planning.colocated``; the keys that lead here are in ``frameworks``.

A launch that is too large dies at the first allocation that no longer fits. Where the GPU itself (not only the margin)
is exceeded, the components of a phase show that moment, and `PhaseEstimate.needed_bytes` what the phase would need. The
first step is looked at first: it has no optimizer states yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.units import ceil_div, gib
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.allocator import fragmentation_bytes
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate, Shortfall
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.overheads import (
    CUDA_CONTEXT_BYTES,
    HOST_DRIVER_BYTES,
    HOST_PROCESS_BYTES,
    SERVED_TRAINER_BYTES,
)
from hydra_plugins.memfit.memory.states import sharded_bytes
from hydra_plugins.memfit.memory.weight_sync import streamed_bytes, whole_tensor_bytes
from hydra_plugins.memfit.planning.roles import Role
from hydra_plugins.memfit.planning.share import budget_beside, kv_shortfalls

APART, SHARED, TURNS = "apart", "shared", "turns"
PLACEMENTS = (APART, SHARED, TURNS)
"""``apart``: no GPU holds both; ``shared``: both stay resident on one GPU; ``turns``: the trainer leaves the GPU between
its phases, and the server if it can sleep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConcurrentRun:
    """One launch as the framework's adapter read it."""

    capacity_bytes: int
    budget_bytes: int
    """Capacity less the margin and less what others hold."""
    held_bytes: int = 0
    host_budget_bytes: int = 0
    placement: str
    """One of `PLACEMENTS`."""
    server_first: bool
    """Whether the server takes its share of a shared GPU before the trainer loads."""
    trainers_per_node: int
    servers_per_node: int
    actor: Role
    reference: Role | None = None
    critic: Role | None = None
    process_each: bool = False
    """Reference and critic are processes of their own, with a CUDA context each."""
    efficient_load: bool = False
    """Weights are read on the host of one rank and sent in pieces, instead of whole on each GPU."""
    stepwise_optimizer: bool = False
    """Optimizer states live on the host and visit the GPU layer by layer in the step."""
    engine: Engine | None = None
    old_log_prob: bool = True
    """Whether the trainer recomputes log-probabilities before its update."""
    sync: str = "stream"
    """``stream``: NCCL from rank 0 to the servers in buckets; ``disk``: through files."""
    bucket_bytes: int = 1 << 30
    expandable_segments: bool = False

    @property
    def beside(self) -> MemoryBreakdown:
        """The server on a GPU of the trainer, while the trainer works."""
        if self.engine is None or self.placement == APART:
            return MemoryBreakdown()
        kv = kv_bytes(self)
        return engines.asleep(self.engine, kv=kv) if self.placement == TURNS else engines.awake(self.engine, kv=kv)


def estimate(run: ConcurrentRun) -> Estimate:
    """Return the predicted peak of every phase on the GPU where it is worst, and what the phases that die would need."""
    phases = [_launch(run), *_rollout(run), *_training(run), *_sync(run)]
    notes = tuple(
        f"{p.name} would need {gib(p.needed_bytes)}; its components are those of the first moment above the "
        f"{gib(run.capacity_bytes - run.held_bytes)} of the GPU, where the run dies."
        for p in phases
        if p.needed_bytes > p.peak_bytes
    )
    return Estimate(phases=tuple(phases), host=_host(run), shortfalls=_shortfalls(run), notes=notes)


# -- who is resident ------------------------------------------------------------------------------------------------
def _others(run: ConcurrentRun, role: Role | None, *, optimizer: bool = True) -> MemoryBreakdown:
    """The trainer's processes with what every role but ``role`` keeps; before the first step no optimizer states."""
    roles = [r for r in (run.actor, run.reference, run.critic) if r is not None]
    contexts = SERVED_TRAINER_BYTES + (CUDA_CONTEXT_BYTES * (len(roles) - 1) if run.process_each else 0)
    total = MemoryBreakdown(context=contexts)
    for other in roles:
        if other is not role and run.placement != TURNS:
            total = total + _kept(other, optimizer=optimizer)
    return total


def _kept(role: Role, *, optimizer: bool) -> MemoryBreakdown:
    """What a role keeps between its passes: gradients stay until its next update begins."""
    if role.cpu_policy:
        return MemoryBreakdown()
    states = MemoryBreakdown(weights=role.parameter_bytes)
    if optimizer and role.trainable_parameters:
        states = states + MemoryBreakdown(gradients=role.gradient_bytes, optimizer_states=role.moment_bytes)
    return states


def _states(role: Role, *, optimizer: bool, gradients: bool) -> MemoryBreakdown:
    kept = _kept(role, optimizer=optimizer)
    return kept if gradients else replace(kept, gradients=0)


# -- the server's share ---------------------------------------------------------------------------------------------
def pool(run: ConcurrentRun) -> engines.Pool:
    """Return what the server's fraction means in bytes; the run must have a server."""
    assert run.engine is not None
    before = 0
    if run.placement != APART and not run.server_first:
        before = (_others(run, None, optimizer=False) + _placed_trainer(run)).total_bytes
    others = run.held_bytes if run.engine.share_of == "free" else 0
    return engines.pool(run.engine, capacity=run.capacity_bytes - others, trainer_at_launch=before)


def _placed_trainer(run: ConcurrentRun) -> MemoryBreakdown:
    """Where trainer and server take turns, the actor's parameters are still there when the server starts."""
    return _kept(run.actor, optimizer=False) if run.placement == TURNS else MemoryBreakdown()


def kv_bytes(run: ConcurrentRun) -> int:
    """Return the server's KV pool; negative when its share does not hold the weights."""
    if run.engine is None or run.engine.fraction is None:
        return 0
    return pool(run).kv_bytes(run.engine.fraction)


def _shortfalls(run: ConcurrentRun) -> tuple[Shortfall, ...]:
    if run.engine is None:
        return ()
    return kv_shortfalls(run.engine, kv_bytes(run), whose="server")


# -- phases ---------------------------------------------------------------------------------------------------------
def _budget(run: ConcurrentRun, *, server: bool) -> int:
    """The budget of a phase; the server's share is a fact, not a prediction, so the margin is kept on the rest alone."""
    if not server or run.engine is None or not run.engine.fraction:
        return run.budget_bytes
    fraction = run.engine.fraction
    return budget_beside(fraction, capacity=run.capacity_bytes, held=run.held_bytes, budget=run.budget_bytes)


def _launch(run: ConcurrentRun) -> PhaseEstimate:
    """Loading: each role brings its whole model to every GPU before it is sharded, one role after the other."""
    moments = []
    resident = MemoryBreakdown(context=_others(run, None).context)
    for role in (run.actor, run.critic, run.reference):
        if role is not None:
            moments.append(resident + _loading(run, role))
            resident = resident + _kept(role, optimizer=False)
    trainer = max(moments, key=lambda moment: moment.total_bytes)
    budget = _budget(run, server=run.placement == SHARED)
    return PhaseEstimate(name="launch", trainer=trainer, engine=_at_start(run), budget_bytes=budget)


def _at_start(run: ConcurrentRun) -> MemoryBreakdown:
    if run.placement == TURNS and run.engine is not None:
        return engines.awake(run.engine, kv=kv_bytes(run))
    return run.beside


def _loading(run: ConcurrentRun, role: Role) -> MemoryBreakdown:
    stored, whole = role.parameter_bytes, role.master_bytes * role.model.parameters
    if role.cpu_policy:
        return MemoryBreakdown()
    tensor = role.master_bytes * role.sharding.embedding
    extra = tensor if run.efficient_load else whole - stored
    return MemoryBreakdown(weights=stored, communication_buffers=max(0, extra))


def _rollout(run: ConcurrentRun) -> list[PhaseEstimate]:
    if run.engine is None:
        return []
    awake = engines.awake(run.engine, kv=kv_bytes(run))
    trainer = MemoryBreakdown() if run.placement == APART else _others(run, None)
    return [
        PhaseEstimate(name="rollout", trainer=trainer, engine=awake, budget_bytes=_budget(run, server=True)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """One phase of the trainer: whose pass, on top of which of its states, through which moments."""

    name: str
    role: Role
    moments: tuple[MemoryBreakdown, ...]
    gradients: bool
    """Whether the gradients of the last step are still there."""
    first: bool = True
    """Whether the phase of the first step is without optimizer states; the step itself creates them."""


def _training(run: ConcurrentRun) -> list[PhaseEstimate]:
    work = []
    if run.old_log_prob:
        work.append(_forward(run.actor, "old_log_prob"))
    if run.reference is not None:
        work.append(_forward(run.reference, "ref_log_prob"))
    if run.critic is not None:
        moments = (*run.critic.update_timeline(), run.critic.step())
        work.append(_forward(run.critic, "values"))
        work.append(_Work(name="update_critic", role=run.critic, moments=moments, gradients=False))
    timeline = run.actor.update_timeline()
    work.append(_Work(name="update_actor", role=run.actor, moments=timeline, gradients=False))
    work.append(_Work(name="optimizer_step", role=run.actor, moments=(_step(run),), gradients=False, first=False))
    return [_phase(run, w) for w in work]


def _forward(role: Role, name: str) -> _Work:
    return _Work(name=name, role=role, moments=(role.forward_pass(),), gradients=True)


def _step(run: ConcurrentRun) -> MemoryBreakdown:
    step = run.actor.step()
    if not run.stepwise_optimizer:
        return step
    visiting = 3 * 2 * run.actor.master_bytes * run.actor.sharding.layer  # moments of the layer, the next and the last
    return step + MemoryBreakdown(optimizer_states=ceil_div(visiting, run.actor.sharding.ranks))


def _phase(run: ConcurrentRun, work: _Work) -> PhaseEstimate:
    engine, budget = run.beside, _budget(run, server=run.placement == SHARED)
    limit = run.capacity_bytes - run.held_bytes
    steady = _reached(run, work, optimizer=True)
    need = _peak(steady)
    total = need.total_bytes + engine.total_bytes
    if total <= limit:
        return PhaseEstimate(name=work.name, trainer=need, engine=engine, budget_bytes=budget)
    first = _reached(run, work, optimizer=not work.first)
    dies = _first_above(first, limit - engine.total_bytes)
    fits_first = dies is None and _peak(first).total_bytes + engine.total_bytes <= budget
    moment = dies or _first_above(steady, limit - engine.total_bytes) or need
    return PhaseEstimate(
        name=work.name, trainer=moment, engine=engine, budget_bytes=budget, needed_bytes=total, later=fits_first
    )


def _reached(run: ConcurrentRun, work: _Work, *, optimizer: bool) -> list[MemoryBreakdown]:
    """The trainer at each moment of the phase."""
    below = _others(run, work.role, optimizer=optimizer)
    below = below + _states(work.role, optimizer=optimizer, gradients=work.gradients)
    return [_with_slack(run, below, moment) for moment in work.moments]


def _with_slack(run: ConcurrentRun, below: MemoryBreakdown, moment: MemoryBreakdown) -> MemoryBreakdown:
    transient = moment.total_bytes - moment.gradients - moment.optimizer_states
    slack = fragmentation_bytes(transient, expandable_segments=run.expandable_segments)
    return below + moment + MemoryBreakdown(fragmentation=slack)


def _peak(moments: Iterable[MemoryBreakdown]) -> MemoryBreakdown:
    return max(moments, key=lambda moment: moment.total_bytes)


def _first_above(moments: Iterable[MemoryBreakdown], limit: int) -> MemoryBreakdown | None:
    return next((moment for moment in moments if moment.total_bytes > limit), None)


def _sync(run: ConcurrentRun) -> list[PhaseEstimate]:
    if run.engine is None:
        return []
    actor, engine = run.actor, run.beside
    if run.sync == "stream":
        sent = min(run.bucket_bytes, 2 * actor.trainable_parameters)
        buffers = streamed_bytes(actor.sharding, master_bytes=actor.master_bytes, bucket_bytes=sent)
        engine = engine + MemoryBreakdown(communication_buffers=sent if run.placement == SHARED else 0)
    else:
        buffers = whole_tensor_bytes(actor.sharding, master_bytes=actor.master_bytes)
    trainer = _others(run, None) + MemoryBreakdown(communication_buffers=buffers)
    if run.placement == TURNS:
        trainer = trainer + _kept(actor, optimizer=True)
    budget = _budget(run, server=run.placement == SHARED)
    return [PhaseEstimate(name="weight_sync", trainer=trainer, engine=engine, budget_bytes=budget)]


# -- host -----------------------------------------------------------------------------------------------------------
def _host(run: ConcurrentRun) -> HostEstimate:
    """Processes, offloaded states, and the whole weights that one rank holds to load or to save them."""
    roles = [r for r in (run.actor, run.reference, run.critic) if r is not None]
    processes = len(roles) if run.process_each else 1
    per_rank = processes * HOST_PROCESS_BYTES + sum(role.host_bytes() for role in roles if role.cpu_policy)
    if run.stepwise_optimizer:
        per_rank += _states_bytes(run.actor)
    if run.placement == TURNS:
        per_rank += sum(_kept(role, optimizer=True).total_bytes for role in roles)
    whole = run.actor.master_bytes * run.actor.model.parameters if run.efficient_load or run.sync == "disk" else 0
    servers = run.servers_per_node * HOST_PROCESS_BYTES
    peak = per_rank * run.trainers_per_node + servers + whole + HOST_DRIVER_BYTES
    return HostEstimate(peak_bytes=peak, budget_bytes=run.host_budget_bytes)


def _states_bytes(role: Role) -> int:
    return sharded_bytes(
        parameters=role.trainable_parameters, bytes_per_parameter=2 * role.master_bytes, ranks=role.sharding.ranks
    )

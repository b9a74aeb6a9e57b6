"""One step of colocated reinforcement learning: trainer and inference engine take turns on the same GPUs.

This is the calendar: which model states are resident in which phase, and whose pass runs on top of them. The formulas
are in ``memory``; the keys that lead here are in ``frameworks``.

Order of a step: rollout, engine sleeps, old log-probabilities, reference, values, critic update, actor update and its
optimizer step, weight sync, KV pool mapped again. Optimizer states do not exist before the first optimizer step, so that
step is the first whose numbers hold for all later ones: this is the step that is modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.allocator import fragmentation_bytes
from hydra_plugins.memfit.memory.breakdown import (
    Estimate,
    HostEstimate,
    MemoryBreakdown,
    PhaseEstimate,
    Shortfall,
)
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.overheads import (
    HOST_DRIVER_BYTES,
    HOST_PROCESS_BYTES,
    SERVED_TRAINER_BYTES,
    trainer_context_bytes,
)
from hydra_plugins.memfit.memory.weight_sync import broadcast_sender_bytes
from hydra_plugins.memfit.planning.roles import Handover, Occupant
from hydra_plugins.memfit.planning.roles import Role as Role
from hydra_plugins.memfit.planning.share import LARGEST_FRACTION, budget_beside, kv_shortfalls, solved_fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class ColocatedRun:
    """One launch with trainer and engine on the same GPUs, as the framework's adapter read it."""

    capacity_bytes: int
    budget_bytes: int
    """Capacity less the margin and less what others hold."""
    held_bytes: int = 0
    """Held by other processes; inside ``capacity_bytes``, outside ``budget_bytes``."""
    host_budget_bytes: int
    """0 where the host's memory is not known."""
    world_size: int
    gpus_per_node: int
    actor: Occupant
    reference: Occupant | None = None
    critic: Occupant | None = None
    engine: Engine | None = None
    """``None``: generation runs in the trainer itself, or on other GPUs."""
    guests: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """Sleeping engines of other models on the same GPUs, and their workers."""
    reward: Occupant | None = None
    """A reward model that the trainer runs itself, without gradients."""
    old_log_prob: bool = True
    """Whether old log-probabilities are computed by the actor."""
    reference_is_actor: bool = False
    """LoRA: the reference is the actor with its adapters switched off."""
    handover: Handover = field(default_factory=Handover)
    engines_apart: bool = False
    """Engines on other GPUs receive the weights, in buckets of the same size."""
    sync_over_reserved: bool = False
    """The cache of the update is not emptied before the engine maps its weights (verl 0.7.1 engine path and 0.8.0)."""
    expandable_segments: bool = False
    tied_load: bool = False
    """Every rank materialises the whole fp32 model on the host while loading."""
    largest_fraction: float = LARGEST_FRACTION
    """No more than this where the engine's fraction is solved for: other ranks may have less room."""
    fraction_key: str = ""
    """Config key of the engine's fraction, for `Estimate.solved`."""


def estimate(run: ColocatedRun) -> Estimate:
    """Return the predicted peak of every phase of one step on the worst GPU."""
    solution = _share(run)
    kv = solution.kv if solution else 0
    phases = [
        *_engine_phases(run, solution),
        *_training_phases(run, kv),
        *_handover_phases(run, solution),
        *_broadcast_phases(run, kv),
    ]
    order = {"launch": 0, "rollout": 1, "weight_sync": 8, "kv_resume": 9}
    phases.sort(key=lambda phase: order.get(phase.name, 5))
    shortfalls = solution.shortfalls if solution else ()
    solved = ((run.fraction_key, solution.fraction),) if solution and solution.solved else ()
    return Estimate(phases=tuple(phases), host=_host(run), shortfalls=shortfalls, solved=solved)


# -- who is resident ------------------------------------------------------------------------------------------------
def _context_bytes(run: ColocatedRun) -> int:
    """What the process holds outside torch; a second communicator where weights go to other GPUs."""
    return SERVED_TRAINER_BYTES if run.engines_apart else trainer_context_bytes(world_size=run.world_size)


def _resting(run: ColocatedRun, *, without: Occupant | None = None, reference_runs: bool = False) -> MemoryBreakdown:
    """Everything of the trainer that stays on the GPU while ``without``, or the reference, runs its own pass."""
    total = MemoryBreakdown(context=_context_bytes(run))
    for role in (run.actor, run.critic):
        if role is not None and role is not without:
            total = total + role.resting()
    return total if reference_runs else total + _reference_rests(run)


def _reference_rests(run: ColocatedRun) -> MemoryBreakdown:
    """The reference's states where it has its own on the GPU, and a gathered root, which may stay all the same."""
    if run.reference is None or run.reference_is_actor:
        return MemoryBreakdown()
    return run.reference.resting() + run.reference.left_root()


def _actor_leak(run: ColocatedRun) -> MemoryBreakdown:
    """The actor's root after its log-probabilities, which its next backward pass frees."""
    passed = run.old_log_prob or (run.reference is not None and run.reference_is_actor)
    return run.actor.left_root() if passed else MemoryBreakdown()


def _at_launch(run: ColocatedRun) -> MemoryBreakdown:
    """The trainer when the engine starts: parameters unless offloaded, no moments, no reference pass yet."""
    total = MemoryBreakdown(context=_context_bytes(run))
    for role in (run.actor, run.critic, None if run.reference_is_actor else run.reference):
        if role is not None:
            total = total + role.at_launch()
    return total


# -- the engine's share ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class _Solution:
    fraction: float
    kv: int
    solved: bool
    shortfalls: tuple[Shortfall, ...]


def _share(run: ColocatedRun) -> _Solution | None:
    """Turn the engine's fraction into a KV pool, or solve for the fraction."""
    engine = run.engine
    if engine is None:
        return None
    at_launch = _at_launch(run).total_bytes + run.guests.total_bytes
    pool = engines.pool(engine, capacity=run.capacity_bytes, trainer_at_launch=at_launch)
    solved = engine.fraction is None
    fraction = engine.fraction
    if fraction is None:
        largest = min(_largest_fraction(run, engine, pool), run.largest_fraction)
        fraction = solved_fraction(engine, pool, largest=largest)
    kv = pool.kv_bytes(fraction)
    return _Solution(fraction=fraction, kv=kv, solved=solved, shortfalls=kv_shortfalls(engine, kv))


def _largest_fraction(run: ColocatedRun, engine: Engine, pool: engines.Pool) -> float:
    """The largest fraction with which the launch, the rollout and the resumption of the pool stay within the budget."""
    resting, guests = _resting(run).total_bytes, run.guests.total_bytes
    if engine.share_of == "device":
        grown = resting - _at_launch(run).total_bytes
        return (run.budget_bytes - max(0, grown) - guests - pool.outside) / pool.base
    if engine.share_of == "free":
        return (run.budget_bytes - resting - guests - pool.outside) / max(1, pool.base)
    at_launch = (run.budget_bytes - _at_launch(run).total_bytes - guests) / pool.base
    return min(at_launch, (run.budget_bytes - resting - guests - pool.outside) / pool.base, LARGEST_FRACTION)


# -- phases ---------------------------------------------------------------------------------------------------------
def _phase(
    run: ColocatedRun, name: str, trainer: MemoryBreakdown, engine: MemoryBreakdown, transient: int = 0
) -> PhaseEstimate:
    fragmentation = fragmentation_bytes(transient, expandable_segments=run.expandable_segments)
    trainer = trainer + MemoryBreakdown(fragmentation=fragmentation)
    if run.engine is not None and run.engine.in_process:
        trainer, engine = trainer + engine, MemoryBreakdown()
    return PhaseEstimate(name=name, trainer=trainer, engine=engine + run.guests, budget_bytes=run.budget_bytes)


def _awake_phase(
    run: ColocatedRun, name: str, trainer: MemoryBreakdown, engine: MemoryBreakdown, solution: _Solution
) -> PhaseEstimate:
    """A phase with the engine awake: its share is a fact, not a prediction, so the margin is kept on the rest alone."""
    phase = _phase(run, name, trainer, engine)
    fraction = None if solution.solved else solution.fraction
    budget = budget_beside(fraction, capacity=run.capacity_bytes, held=run.held_bytes, budget=run.budget_bytes)
    return replace(phase, budget_bytes=budget)


def _engine_phases(run: ColocatedRun, solution: _Solution | None) -> list[PhaseEstimate]:
    if run.engine is None or solution is None:
        return []
    awake = engines.awake(run.engine, kv=solution.kv)
    return [
        _awake_phase(run, "launch", _at_launch(run), awake, solution),
        _awake_phase(run, "rollout", _resting(run), awake, solution),
    ]


def _sleeping(run: ColocatedRun, kv: int) -> MemoryBreakdown:
    return MemoryBreakdown() if run.engine is None else engines.asleep(run.engine, kv=kv)


def beside_a_guest(run: ColocatedRun) -> tuple[MemoryBreakdown, MemoryBreakdown, MemoryBreakdown]:
    """Return what a guest meets: the trainer when it starts, the trainer at rest, and the sleeping engine."""
    solution = _share(run)
    return _at_launch(run), _resting(run), _sleeping(run, solution.kv if solution else 0)


def _training_phases(run: ColocatedRun, kv: int) -> list[PhaseEstimate]:
    engine = _sleeping(run, kv)
    phases = []
    actor_rest = _resting(run, without=run.actor)
    if run.old_log_prob:
        pass_ = run.actor.forward_pass()
        states = actor_rest + run.actor.loaded(optimizer=False)
        phases.append(_phase(run, "old_log_prob", states + pass_, engine, pass_.total_bytes))
    phases += _reference_phase(run, actor_rest, engine)
    phases += _reward_phase(run, engine)
    phases += _critic_phases(run, engine)
    update = run.actor.update_pass()
    loaded = actor_rest + run.actor.loaded(optimizer=True)
    phases.append(_phase(run, "update_actor", loaded + update, engine, _transient(update)))
    phases.append(_phase(run, "optimizer_step", loaded + run.actor.step(), engine))
    return phases


def _reference_phase(run: ColocatedRun, actor_rest: MemoryBreakdown, engine: MemoryBreakdown) -> list[PhaseEstimate]:
    if run.reference is None:
        return []
    pass_ = run.reference.forward_pass()
    if run.reference_is_actor:
        states = actor_rest + run.actor.loaded(optimizer=False)
    else:
        states = _resting(run, reference_runs=True) + run.reference.loaded(optimizer=False) + _actor_leak(run)
    return [_phase(run, "ref_log_prob", states + pass_, engine, pass_.total_bytes)]


def _reward_phase(run: ColocatedRun, engine: MemoryBreakdown) -> list[PhaseEstimate]:
    """The trainer's own reward model scores what was generated, before anything else of the trainer runs."""
    if run.reward is None:
        return []
    pass_ = run.reward.forward_pass()
    states = _resting(run) + run.reward.loaded(optimizer=False)
    return [_phase(run, "values", states + pass_, engine, pass_.total_bytes)]


def _critic_phases(run: ColocatedRun, engine: MemoryBreakdown) -> list[PhaseEstimate]:
    critic = run.critic
    if critic is None:
        return []
    others = _resting(run, without=critic) + _actor_leak(run)
    values = critic.forward_pass()
    update = critic.update_pass()
    loaded = others + critic.loaded(optimizer=True)
    step = critic.step()
    worst = max(update, step, key=lambda moment: moment.total_bytes)
    return [
        _phase(run, "values", others + critic.loaded(optimizer=False) + values, engine, values.total_bytes),
        _phase(run, "update_critic", loaded + worst, engine, _transient(worst) if worst is update else 0),
    ]


def _handover_phases(run: ColocatedRun, solution: _Solution | None) -> list[PhaseEstimate]:
    if run.engine is None or solution is None:
        return []
    actor = run.actor
    moment = actor.buffers(run.handover)
    resident = _resting(run, without=actor) + actor.sending()
    cached = actor.left_in_cache() if run.sync_over_reserved else MemoryBreakdown()
    receiving = engines.receiving(run.engine, kv=solution.kv)
    sync = _phase(run, "weight_sync", resident + moment + cached, receiving, moment.total_bytes)
    resume = _awake_phase(run, "kv_resume", _resting(run), engines.awake(run.engine, kv=solution.kv), solution)
    return [sync, resume]


def _broadcast_phases(run: ColocatedRun, kv: int) -> list[PhaseEstimate]:
    """Sending the weights to engines on other GPUs, while those on this one sleep; nobody empties the cache before."""
    if not run.engines_apart:
        return []
    gathered = run.actor.buffers(replace(run.handover, bucket_bytes=0))
    buckets = broadcast_sender_bytes(bucket_bytes=run.handover.bucket_bytes)
    unused = max(0, run.actor.left_in_cache().total_bytes - gathered.total_bytes)
    sending = gathered + MemoryBreakdown(communication_buffers=buckets, fragmentation=unused)
    resident = _resting(run, without=run.actor) + run.actor.sending()
    return [_phase(run, "weight_sync", resident + sending, _sleeping(run, kv), gathered.total_bytes)]


def _transient(moment: MemoryBreakdown) -> int:
    """What a pass allocates and frees: everything but the resident gradients."""
    return moment.total_bytes - moment.gradients


# -- host -----------------------------------------------------------------------------------------------------------
def _host(run: ColocatedRun) -> HostEstimate:
    """Offloaded states, the reference, sleep copies and the processes of one host; or the load, where that is more."""
    ranks = min(run.gpus_per_node, run.world_size)
    per_rank = run.actor.host_bytes() + HOST_PROCESS_BYTES
    if run.critic is not None:
        per_rank += run.critic.host_bytes()
    if run.reference is not None and not run.reference_is_actor:
        per_rank += run.reference.host_bytes()
    if run.reward is not None:
        per_rank += run.reward.host_bytes()
    if run.engine is not None:
        per_rank += 0 if run.engine.in_process else HOST_PROCESS_BYTES
        per_rank += engines.weight_bytes(run.engine) if run.engine.weights_on_host else 0
    copies = ranks if run.tied_load else 1
    load = copies * run.actor.host_load_bytes() + ranks * HOST_PROCESS_BYTES
    return HostEstimate(peak_bytes=max(per_rank * ranks, load) + HOST_DRIVER_BYTES, budget_bytes=run.host_budget_bytes)

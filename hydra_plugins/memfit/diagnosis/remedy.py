"""What would have fit: the planner, with the lesson that this launch died where the log says it died.

The lesson is one number: what the failing phase needed at the least (in use + asked for) beyond memfit's own prediction of
it. It is added to that phase as ``fragmentation``, the term of the unexplained remainder, for every setting that is tried;
where the engine is awake it counts as taken by others, since the engine's share is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.memory.breakdown import Estimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.planning.problem import Plan, Problem
from hydra_plugins.memfit.planning.search import make_plan

_AWAKE = ("launch", "rollout", "kv_resume")
"""Phases in which the engine holds its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """The plan after the failure."""

    plan: Plan | None
    """``None`` where the launch would die for another reason than its size; `refusal` says which."""
    predicted: PhaseEstimate | None
    """What memfit predicts for the failing phase of the launch as it ran; ``None`` where the phase is not known."""
    learned_bytes: int = 0
    """What the failing phase needed beyond the prediction."""
    refusal: str = ""
    """Why nothing would have fitted; empty where something would."""
    explained: bool = True
    """The launch as it ran does not fit, by memfit's account and the lesson. Otherwise a plan says nothing about the failure."""


def remedy(
    problem: Problem, pinned: frozenset[str], finding: Finding, with_held: Callable[[int], Problem] | None = None
) -> Remedy:
    """Return what would have fitted instead of the launch that died with ``finding``.

    ``with_held`` reads the same launch for a device on which so many bytes are taken: an engine's share is solved for, so
    what its phases needed beyond the prediction has to be known before.
    """
    requested = problem.estimate({})
    predicted = _phase(requested, finding.phase)
    learned, host = _learned(predicted, finding), _host_learned(requested, finding)
    if learned and finding.phase in _AWAKE and with_held is not None:
        taught = with_held(learned)
    else:
        taught = replace(
            problem, estimate=lambda values: _taught(problem.estimate(values), finding.phase, learned, host)
        )
    told = Remedy(plan=None, predicted=predicted, learned_bytes=learned, explained=not taught.estimate({}).fits)
    try:
        return replace(told, plan=make_plan(taught, pinned=pinned))
    except NoPlanFits as error:
        return replace(told, plan=error.plan if isinstance(error.plan, Plan) else None, refusal=str(error))
    except ConfigError as error:
        return replace(told, refusal=str(error))


def _phase(estimate: Estimate, name: str | None) -> PhaseEstimate | None:
    return next((phase for phase in estimate.phases if phase.name == name), None)


def _learned(predicted: PhaseEstimate | None, finding: Finding) -> int:
    """Return what the phase needed beyond its prediction, and at least so much that the launch as it ran does not fit."""
    if predicted is None or finding.kind.resource != "gpu":
        return 0
    needed = max(finding.needed_bytes or 0, predicted.budget_bytes + 1)
    return max(0, needed - predicted.whole_bytes)


def _host_learned(estimate: Estimate, finding: Finding) -> int:
    """The same for the host, where the message says how large the host is."""
    total = finding.amounts.get("total")
    if finding.kind.resource != "host" or total is None:
        return 0
    return max(0, total.num_bytes + 1 - estimate.host.peak_bytes)


def _taught(estimate: Estimate, name: str | None, learned: int, host: int) -> Estimate:
    if not learned and not host:
        return estimate
    phases = tuple(_more(phase, learned) if phase.name == name else phase for phase in estimate.phases)
    return replace(estimate, phases=phases, host=replace(estimate.host, peak_bytes=estimate.host.peak_bytes + host))


def _more(phase: PhaseEstimate, learned: int) -> PhaseEstimate:
    trainer = phase.trainer + MemoryBreakdown(fragmentation=learned)
    needed = phase.needed_bytes + learned if phase.needed_bytes else 0
    return replace(phase, trainer=trainer, needed_bytes=needed)


def engine_arithmetic(finding: Finding) -> str:
    """Return what the numbers of an engine's refusal say about its share; empty where they say nothing."""
    amounts, numbers = finding.amounts, finding.numbers
    if finding.kind.name == "engine_free_memory" and {"free", "capacity"} <= set(amounts):
        share = amounts["free"].num_bytes / amounts["capacity"].num_bytes
        return (
            f"{gib(amounts['free'].num_bytes)} of {gib(amounts['capacity'].num_bytes)} were free: this engine starts with "
            f"a share of {int(share * 100) / 100:.2f} or less"
        )
    if finding.kind.name == "engine_kv_too_small":
        return _kv_arithmetic(numbers)
    return ""


def _kv_arithmetic(numbers: Mapping[str, str]) -> str:
    wanted, most = numbers.get("asked_tokens"), numbers.get("most_tokens")
    return f"one sequence of {wanted} tokens was asked for, {most} tokens fit into the pool" if wanted and most else ""

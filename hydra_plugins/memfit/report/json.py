"""A plan as JSON: the stable contract that other tools read. Bytes are ints and, except for ``host``, of one GPU."""

from __future__ import annotations

from typing import Any

from hydra_plugins.memfit.memory.breakdown import Estimate, PhaseEstimate
from hydra_plugins.memfit.planning.problem import Change, Plan, Problem


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan in the shape of the JSON contract (docs/cli.md), made of plain dicts, lists, strings and numbers.

    ``peak_bytes`` is the largest peak of any phase; ``budget_bytes`` and ``binding_phase`` come from the binding one.
    """
    problem, estimate = plan.problem, plan.estimate
    return {
        "framework": problem.framework,
        "framework_version": problem.framework_version,
        "hardware": _hardware(problem),
        "model": {"name": problem.model.name, "parameters": problem.model.parameters, "source": problem.model.source},
        "fits": plan.fits,
        "budget_bytes": plan.binding_phase.budget_bytes,
        "peak_bytes": max(phase.peak_bytes for phase in estimate.phases),
        "binding_phase": plan.binding_phase.name,
        "phases": [phase_dict(phase) for phase in estimate.phases],
        "host": _host(estimate),
        "changes": [change_dict(change) for change in plan.changes],
        "pinned": list(plan.pinned),
        "warnings": all_warnings(plan),
    }


def all_warnings(plan: Plan) -> list[str]:
    """Return every sentence that the user should read, once each: what would stop the launch first, then the rest."""
    problem = plan.problem
    shortfalls = [f"{s.phase}: {s.why}" for s in plan.estimate.shortfalls]
    said = (
        *problem.blockers,
        *plan.estimate.refusals,
        *shortfalls,
        *problem.hardware.warnings,
        *problem.warnings,
        *plan.warnings,
    )
    return list(dict.fromkeys((*said, *plan.estimate.notes)))


def _hardware(problem: Problem) -> dict[str, Any]:
    return {
        "name": problem.hardware.name,
        "capacity_bytes": problem.hardware.capacity_bytes,
        "gpus_per_node": problem.gpus_per_node,
        "nodes": problem.nodes,
        "source": problem.hardware.source,
    }


def phase_dict(phase: PhaseEstimate) -> dict[str, Any]:
    """Return one phase in the shape of the JSON contract."""
    return {
        "name": phase.name,
        "peak_bytes": phase.peak_bytes,
        "budget_bytes": phase.budget_bytes,
        "fits": phase.fits,
        "components": phase.components.as_dict(),
        "processes": {"trainer": phase.trainer.total_bytes, "engine": phase.engine.total_bytes},
    }


def _host(estimate: Estimate) -> dict[str, Any]:
    host = estimate.host
    return {"peak_bytes": host.peak_bytes, "budget_bytes": host.budget_bytes, "fits": host.fits}


def change_dict(change: Change) -> dict[str, Any]:
    """Return one change in the shape of the JSON contract."""
    return {"key": change.key, "from": change.old, "to": change.new, "kind": change.kind, "why": change.why}

"""The JSON contract of a plan, and a check that a document keeps it: exactly these keys, exactly these types."""

from __future__ import annotations

from typing import Any

from hydra_plugins.memfit.memory.breakdown import PHASES

COMPONENTS = (
    "weights",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "kv_cache",
    "communication_buffers",
    "engine_residual",
    "context",
    "fragmentation",
)
_ANY_VALUE = (int, float, bool, str, type(None))
_PHASE = {
    "name": str,
    "peak_bytes": int,
    "budget_bytes": int,
    "fits": bool,
    "components": dict.fromkeys(COMPONENTS, int),
    "processes": {"trainer": int, "engine": int},
}
PLAN = {
    "framework": str,
    "framework_version": str,
    "hardware": {"name": str, "capacity_bytes": int, "gpus_per_node": int, "nodes": int, "source": str},
    "model": {"name": str, "parameters": int, "source": str},
    "fits": bool,
    "budget_bytes": int,
    "peak_bytes": int,
    "binding_phase": str,
    "phases": [_PHASE],
    "host": {"peak_bytes": int, "budget_bytes": int, "fits": bool},
    "changes": [{"key": str, "from": _ANY_VALUE, "to": _ANY_VALUE, "kind": str, "why": str}],
    "pinned": [str],
    "warnings": [str],
}


def violations(document: Any, shape: Any = PLAN, path: str = "plan") -> list[str]:
    """Return what in ``document`` is not as ``shape`` says: missing or unknown keys, other types."""
    if isinstance(shape, dict):
        if not isinstance(document, dict):
            return [f"{path} is not an object"]
        wrong = [f"{path} has keys {sorted(document)}, not {sorted(shape)}"] if set(document) != set(shape) else []
        return wrong + [w for k in shape if k in document for w in violations(document[k], shape[k], f"{path}.{k}")]
    if isinstance(shape, list):
        if not isinstance(document, list):
            return [f"{path} is not a list"]
        return [w for i, item in enumerate(document) for w in violations(item, shape[0], f"{path}[{i}]")]
    valid = isinstance(document, shape) and (shape is not int or not isinstance(document, bool))
    return [] if valid else [f"{path} is {document!r}"]


def inconsistencies(plan: dict[str, Any]) -> list[str]:
    """Return where the numbers of a valid document contradict each other."""
    phases = {phase["name"]: phase for phase in plan["phases"]}
    wrong = [f"{name} is no phase" for name in phases if name not in PHASES]
    for name, phase in phases.items():
        for part in ("components", "processes"):
            if sum(phase[part].values()) != phase["peak_bytes"]:
                wrong.append(f"{part} of {name} do not sum to its peak")
        if phase["fits"] != (phase["peak_bytes"] <= phase["budget_bytes"]):
            wrong.append(f"{name}.fits contradicts its numbers")
    if plan["peak_bytes"] != max(phase["peak_bytes"] for phase in phases.values()):
        wrong.append("peak_bytes is not the largest peak")
    if plan["budget_bytes"] != phases[plan["binding_phase"]]["budget_bytes"]:
        wrong.append("budget_bytes is not the budget of the binding phase")
    if plan["fits"] and not (plan["host"]["fits"] and all(phase["fits"] for phase in phases.values())):
        wrong.append("the plan fits and a part of it does not")
    return wrong

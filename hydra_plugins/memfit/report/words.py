"""The sentences of a report: plain strings, without layout or colour."""

from __future__ import annotations

from collections.abc import Sequence

from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.memory.breakdown import Estimate, PhaseEstimate
from hydra_plugins.memfit.planning.problem import Change, Plan


def launch(plan: Plan) -> str:
    """Return which framework runs on what: ``verl 0.9.1 on 1 x h200``."""
    problem = plan.problem
    nodes = f"{problem.nodes} nodes of " if problem.nodes > 1 else ""
    devices = f"{nodes}{problem.gpus_per_node} x {problem.hardware.name}"
    return f"{problem.framework} {problem.framework_version} on {devices}"


def verdict(plan: Plan) -> str:
    """Return whether the launch fits and what decides, in one sentence."""
    if not plan.fits:
        return state(plan.estimate)
    if plan.estimate.refusals:
        return f"fits by size, but does not start: {plan.estimate.refusals[0]}"
    how = f"with {count(len(plan.changes), 'changed value')}" if plan.changes else "as requested"
    return f"fits {how}: {_tightest(plan.estimate)}"


def state(estimate: Estimate) -> str:
    """Return whether one prediction fits, and what decides."""
    if not estimate.fits:
        return f"does not fit: {obstacle(estimate)}"
    return f"is refused: {estimate.refusals[0]}" if estimate.refusals else f"fits: {_tightest(estimate)}"


def _tightest(estimate: Estimate) -> str:
    phase = estimate.binding_phase
    return f"{phase.name} is the tightest, {gib(phase.peak_bytes)} of {gib(phase.budget_bytes)}"


def obstacle(estimate: Estimate) -> str:
    """Return the first thing that does not fit, with what it needs and what there is; the estimate must not fit."""
    phase, host = estimate.binding_phase, estimate.host
    if not phase.fits:
        return f"{phase.name} needs {gib(phase.budget_bytes + phase.excess_bytes)}, {_over(phase.excess_bytes, phase.budget_bytes)}"
    if estimate.shortfalls:
        return f"{estimate.shortfalls[0].phase}: {estimate.shortfalls[0].why}"
    return f"the host needs {gib(host.peak_bytes)} of memory, {_over(host.excess_bytes, host.budget_bytes)}"


def refusal(plan: Plan) -> str:
    """Return why a launch stops for which something else than memfit's own knobs has to change."""
    return f"no plan fits: {obstacle(plan.estimate)}"


def largest(phase: PhaseEstimate) -> str:
    """Return the largest components of a phase, and what they are of where the phase dies before it needs the most."""
    when = f" when {gib(phase.peak_bytes)} are reached and it dies" if phase.whole_bytes > phase.peak_bytes else ""
    return f"largest in {phase.name}{when}: {largest_terms(phase)}"


def largest_terms(phase: PhaseEstimate, num_terms: int = 3) -> str:
    """Return the largest components of ``phase``, largest first: ``logits 40.00 GiB, weights 12.00 GiB``."""
    terms = sorted(phase.components.as_dict().items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in terms[:num_terms] if num_bytes)


def hardware(plan: Plan) -> str:
    """Return the accelerator, its usable size, where that was read, and what is kept free of it."""
    accelerator, margin = plan.problem.hardware, plan.problem.margin
    held = f", {gib(accelerator.held_bytes)} held by other processes" if accelerator.held_bytes else ""
    default = f", {margin.segments}" if margin.segments and not margin.given else ""
    kept = f"; {margin.share:.0%} kept free (memfit.margin={margin.share:g}{default})" if margin.share else ""
    return f"{accelerator.product}, {gib(accelerator.capacity_bytes)} usable ({accelerator.source}){held}{kept}"


def model(plan: Plan) -> str:
    """Return the model, its size and where its architecture was read."""
    spec = plan.problem.model
    return f"{spec.name}, {parameters(spec.parameters)} parameters ({spec.source})"


def parameters(number: int) -> str:
    """Return a number of parameters for people.

    >>> parameters(3_085_938_688), parameters(494_032_768)
    ('3.09 B', '494 M')
    """
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def host(estimate: Estimate) -> str:
    """Return what the host needs of what it has, or an empty string where nothing is predicted."""
    need, budget = estimate.host.peak_bytes, estimate.host.budget_bytes
    if not need:
        return ""
    return f"{gib(need)} of {gib(budget)}" if budget else f"{gib(need)} (budget not known: memfit.host_memory_bytes=N)"


def version(plan: Plan) -> str:
    """Return that the framework's version is assumed, where it is; else an empty string."""
    problem = plan.problem
    if not problem.version_assumed:
        return ""
    return f"{problem.framework_version}, assumed: {problem.framework} is not installed here"


def facts(plan: Plan) -> dict[str, str]:
    """Return what the prediction was made for, by label, without what is not known."""
    found = {"version": version(plan), "hardware": hardware(plan), "model": model(plan), "host": host(plan.estimate)}
    return {label: text for label, text in found.items() if text}


def budgets(plan: Plan) -> str:
    """Return why phases have different budgets, or an empty string where they have one."""
    sizes = {phase.budget_bytes for phase in plan.estimate.phases}
    if len(sizes) < 2:
        return ""
    return "budgets differ: an engine's share is set, not predicted, and needs no margin"


def unset(plan: Plan) -> str:
    """Return what is counted as asked for where the launch leaves a value unset that its framework needs, or nothing."""
    needed = {knob.key for knob in plan.problem.knobs if knob.required and knob.requested is None}
    keys = [change.key for change in plan.changes if change.key in needed]
    if not keys or not plan.requested.refusals:  # elsewhere an unset value has a meaning of its own
        return ""
    return f"asked: {listed(keys, 2)} unset, so the whole batch is counted in one piece"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first ``most`` names, and how many more there are.

    >>> listed(["a", "b", "c"], 2), listed(["a"], 2)
    ('a, b and 1 more', 'a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def training(plan: Plan) -> str:
    """Return whether what is learned stays the same."""
    semantic = [change.key for change in plan.changes if change.kind != "neutral"]
    if semantic:
        return f"TRAINING CHANGES: {', '.join(semantic)}"
    return "training unchanged: no value that changes what is learned was touched" if plan.changes else ""


def step(change: Change) -> str:
    """Return what became of one value, as the config writes it: ``null -> 8``."""
    return f"{shown(change.old)} -> {shown(change.new)}"


def count(number: int, noun: str) -> str:
    """Return ``1 change`` or ``2 changes``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _over(excess_bytes: int, budget_bytes: int) -> str:
    return f"{gib(excess_bytes)} over its budget of {gib(budget_bytes)}"


def shown(value: object) -> str:
    """Return a value as the config writes it: ``null``, ``true``, ``8``."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)

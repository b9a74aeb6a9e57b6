"""What an adapter hands to the planner: the knobs it may turn, and the prediction for any setting of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.allocator import Margin
from hydra_plugins.memfit.memory.breakdown import Estimate, PhaseEstimate
from hydra_plugins.memfit.model.spec import ModelSpec

Value = int | float | bool | str | None


class _Solve(Enum):
    SOLVE = "solve"


SOLVE = _Solve.SOLVE
"""A candidate that leaves the number to the estimate: `Estimate.solved` says which value it took (an engine's share)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One config key that the planner may set. The same key may appear in several knobs of different cost."""

    key: str
    """Dotted key of the framework's config."""
    requested: Value
    """What the composed config asks for; ``None`` when it is unset."""
    candidates: tuple[object, ...]
    """Values in the order in which they are given up: each one needs no more memory than the one before, and is slower."""
    cost: int
    """Rank in the order of spending: a lower rank is cheaper in speed and is spent first."""
    kind: str = "neutral"
    """``neutral``: what is learned does not change; ``semantic``: it does."""
    why: str = ""
    """What turning it does, for the report: `fewer tokens in a micro-batch`."""
    required: bool = False
    """The framework refuses an unset value: fill it in even when everything fits."""
    companions: Callable[[object], Mapping[str, object]] | None = None
    """Other keys that must change with this one, for a value of it (offload_policy needs strategy=fsdp2)."""
    companions_required: bool = True
    """A value whose companion is pinned to something else is not used; ``False``: it is, and the pinned key stays."""
    fast: tuple[object, ...] = ()
    """Values that are faster than the requested one, fastest first; tried under ``memfit.goal=fast`` and for unset ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One launch, as the planner sees it: no framework, no Hydra, no formula."""

    framework: str
    framework_version: str
    version_assumed: bool = False
    """Nobody named the version and the framework is not installed: the newest that memfit knows stands for it."""
    hardware: Hardware
    model: ModelSpec
    gpus_per_node: int
    nodes: int
    settings: Settings
    margin: Margin
    """What the estimate's budgets keep free."""
    knobs: tuple[Knob, ...]
    estimate: Callable[[Mapping[str, object]], Estimate]
    """Prediction for values by key; a key that is missing keeps the requested value."""
    composed: Callable[[str], Value] = lambda key: None
    """The composed value of any key, for companions that are no knobs themselves."""
    fixes: tuple[Change, ...] = ()
    """Changes that are needed whatever the memory says (a value that the framework would refuse), already in `estimate`."""
    warnings: tuple[str, ...] = ()
    alike: Mapping[str, str] = field(default_factory=dict)
    """What, beside framework, model and hardware, makes the errors of two predictions alike: strategy, engine."""
    composed_once: bool = False
    """One process alone composes and plans a launch, on however many nodes: no other one can come to another plan."""
    blockers: tuple[str, ...] = ()
    """Reasons, other than size, for which the launch would die; each says the fix. They stop a strict launch."""


def remembered(estimate: Callable[[Mapping[str, object]], Estimate]) -> Callable[[Mapping[str, object]], Estimate]:
    """Return the same prediction, computed once for each set of values: a search asks for many of them again."""
    known: dict[frozenset[tuple[str, object]], Estimate] = {}

    def predict(values: Mapping[str, object]) -> Estimate:
        asked = frozenset(values.items())
        if asked not in known:
            known[asked] = estimate(values)
        return known[asked]

    return predict


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One value that the plan sets."""

    key: str
    old: Value
    new: Value
    kind: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer for one launch and its reasons."""

    problem: Problem
    requested: Estimate
    """The prediction for the launch as it was asked for."""
    estimate: Estimate
    """The prediction for the plan; equals `requested` when nothing is changed."""
    changes: tuple[Change, ...] = ()
    pinned: tuple[str, ...] = ()
    proposals: tuple[Change, ...] = ()
    """When nothing fits: the semantic changes, or released pins, that would make it fit."""
    rejected: tuple[tuple[str, str], ...] = ()
    """Knobs that were tried and not used: (key, reason)."""
    warnings: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def fits(self) -> bool:
        """Whether the planned launch fits, by memfit's own account."""
        return self.estimate.fits

    @property
    def binding_phase(self) -> PhaseEstimate:
        """The phase that decides: the first that does not fit, else the one with the least headroom."""
        return self.estimate.binding_phase

    @property
    def trains_the_same(self) -> bool:
        """Whether no change touches what is learned."""
        return all(c.kind == "neutral" for c in self.changes)

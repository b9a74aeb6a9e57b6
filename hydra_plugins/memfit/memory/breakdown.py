"""The vocabulary of a prediction: bytes of one GPU in one phase, split by what they hold and by whose process they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from operator import add, attrgetter

from hydra_plugins.memfit.base.errors import MemfitError

PHASES = (
    "launch",
    "rollout",
    "old_log_prob",
    "ref_log_prob",
    "values",
    "update_critic",
    "update_actor",
    "optimizer_step",
    "weight_sync",
    "kv_resume",
    "generate",
    "train_step",
)
"""The phase names of the JSON contract, in the order in which one training step runs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """Bytes of one process on one GPU at the peak of one phase, by what they hold."""

    weights: int = 0
    """Parameters that stay resident: fp32 shards of the trainer, the engine's own weights."""
    gradients: int = 0
    optimizer_states: int = 0
    """Adam moments, and the temporaries of the optimizer step."""
    activations: int = 0
    """Saved and recomputed activations of the transformer body, and the engine's forward workspace."""
    logits: int = 0
    """Everything with a vocabulary dimension: logits, their gradients, entropy and cross-entropy copies."""
    kv_cache: int = 0
    communication_buffers: int = 0
    """Gathered (unsharded) parameters and gradients, reduce buffers, weight-sync buckets."""
    engine_residual: int = 0
    """What a sleeping inference engine keeps on the GPU: its context, NCCL, CUDA graphs, allocator leftovers."""
    context: int = 0
    """CUDA context, NCCL communicators and library workspaces of the process."""
    fragmentation: int = 0
    """Reserved by the caching allocator and not usable: the unexplained remainder has this name and no other."""

    @property
    def total_bytes(self) -> int:
        """Sum of all components."""
        return sum(_components(self))

    def __add__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return MemoryBreakdown(**dict(zip(COMPONENTS, map(add, _components(self), _components(other)), strict=True)))

    def as_dict(self) -> dict[str, int]:
        """Return the components by name, in the order of the JSON contract."""
        return dict(zip(COMPONENTS, _components(self), strict=True))


COMPONENTS = tuple(f.name for f in fields(MemoryBreakdown))
"""The component names of the JSON contract."""
_components = attrgetter(*COMPONENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEstimate:
    """The predicted peak of one phase on the worst GPU of the launch."""

    name: str
    """One of `PHASES`."""
    trainer: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """The process that trains (or generates, where there is one process only)."""
    engine: MemoryBreakdown = field(default_factory=MemoryBreakdown)
    """The inference engine's process; empty where it shares no GPU with the trainer."""
    budget_bytes: int
    """What the phase may use: capacity less the margin and less what others hold."""
    needed_bytes: int = 0
    """What the phase would need, where the components show the moment at which it dies; 0: the same as the peak."""
    later: bool = False
    """The first step of the run still fits; the phase dies from the second step on."""

    def __post_init__(self) -> None:
        if self.name not in PHASES:
            raise MemfitError(f"phase {self.name!r} is not one of {', '.join(PHASES)}")

    @property
    def components(self) -> MemoryBreakdown:
        """Both processes together."""
        return self.trainer + self.engine

    @property
    def peak_bytes(self) -> int:
        """Predicted bytes of this GPU in use at the peak."""
        return self.trainer.total_bytes + self.engine.total_bytes

    @property
    def whole_bytes(self) -> int:
        """Bytes that the phase would need in all: the peak, or more where the components stop at the moment at which it dies."""
        return max(self.peak_bytes, self.needed_bytes)

    @property
    def excess_bytes(self) -> int:
        """Bytes above the budget; 0 when the phase fits."""
        return max(0, self.whole_bytes - self.budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget."""
        return self.excess_bytes == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostEstimate:
    """Predicted memory of one host: offloaded states, sleep copies, processes. ``budget_bytes=0``: not known."""

    peak_bytes: int = 0
    budget_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the host holds it; an unknown budget is not a refusal."""
        return self.budget_bytes == 0 or self.peak_bytes <= self.budget_bytes

    @property
    def excess_bytes(self) -> int:
        """Bytes above the budget; 0 when it fits or when the budget is not known."""
        return 0 if self.fits else self.peak_bytes - self.budget_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortfall:
    """Something that is given too little: an engine whose share cannot hold its weights and one sequence."""

    phase: str
    num_bytes: int
    why: str
    """One sentence for the user, with numbers and units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The prediction for one assignment of the knobs."""

    phases: tuple[PhaseEstimate, ...]
    host: HostEstimate = field(default_factory=HostEstimate)
    shortfalls: tuple[Shortfall, ...] = ()
    solved: tuple[tuple[str, float | int], ...] = ()
    """Values that the estimate chose for knobs set to `SOLVE` (key, value)."""
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why the framework would refuse these values at any size; each says the fix."""

    @property
    def fits(self) -> bool:
        """Whether every phase, every engine and the host fit."""
        return all(p.fits for p in self.phases) and self.host.fits and not self.shortfalls

    @property
    def violation_bytes(self) -> int:
        """Sum of everything that is too much or too little; 0 exactly when `fits`."""
        return (
            sum(p.excess_bytes for p in self.phases)
            + self.host.excess_bytes
            + sum(max(1, s.num_bytes) for s in self.shortfalls)
        )

    @property
    def binding_phase(self) -> PhaseEstimate:
        """The first phase of a step that does not fit (where the run would die), else the one with the least headroom."""
        return binding(self.phases)

    def phase(self, name: str) -> PhaseEstimate:
        """Return the phase called ``name``; raises `KeyError` when the launch has no such phase."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)


def binding(phases: Iterable[PhaseEstimate]) -> PhaseEstimate:
    """
    Return the first phase that does not fit, else the one with the least headroom.

    A rollout counts last: its steady state holds optimizer states, which the rollout of the first step does not have yet.
    So does any other phase that only dies in the second step.
    """
    ordered = sorted(phases, key=lambda phase: phase.later or phase.name == "rollout")
    for phase in ordered:
        if not phase.fits:
            return phase
    return min(ordered, key=lambda p: p.budget_bytes - p.peak_bytes)

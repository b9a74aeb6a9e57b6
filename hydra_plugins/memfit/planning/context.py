"""What an adapter is given beside the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.allocator import Margin, margin_for
from hydra_plugins.memfit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of one launch: everything that an adapter may know and the config does not say."""

    hardware: Hardware
    settings: Settings
    resolve_model: Callable[[str], ModelSpec]
    """Architecture of a model path, hub id or conf/model name; raises `ModelNotFound`."""
    model: ModelSpec | None = None
    """From ``+model=`` or ``--model``; wins over the path in the config for the trained policy."""
    gpus_per_node: int | None = None
    """From ``--gpus``; wins over the config's own count."""
    nodes: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    """Environment of the launch, for settings that live there (PYTORCH_CUDA_ALLOC_CONF, batch sizes of a TPU runner)."""
    pinned: frozenset[str] = frozenset()
    """Keys that stand after the hardware group, or in ``memfit.pin``: the planner never touches them."""
    explicit: frozenset[str] = frozenset()
    """Keys that the user wrote himself (command line), as against defaults of the framework."""

    expandable_segments: bool | None = None
    """Whether torch's allocator in the trainer has expandable segments; ``None``: no trainer of torch, or not read yet."""

    @property
    def margin(self) -> Margin:
        """What is kept free: the user's own share, or the default of the trainer's allocator."""
        return margin_for(self.settings.margin, expandable_segments=self.expandable_segments)

    @property
    def budget_bytes(self) -> int:
        """What the launch may use of one device: its capacity less the margin and less what others hold."""
        return max(1, int(self.hardware.capacity_bytes * (1 - self.margin.share)) - self.hardware.held_bytes)

    @property
    def host_budget_bytes(self) -> int:
        """Memory of one host; 0 where it is not known."""
        return self.settings.host_memory_bytes or self.hardware.host_memory_bytes or 0

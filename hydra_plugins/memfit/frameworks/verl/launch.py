"""What does not change while knobs are turned: the surroundings of one verl launch, and the sections that its keys are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.placement import FRACTION as FRACTION
from hydra_plugins.memfit.frameworks.verl.placement import ROLLOUT as ROLLOUT
from hydra_plugins.memfit.frameworks.verl.placement import Placement
from hydra_plugins.memfit.frameworks.verl.versions import Behaviour
from hydra_plugins.memfit.memory.allocator import Margin
from hydra_plugins.memfit.model.spec import ModelSpec

ARR = "actor_rollout_ref"
ACTOR, REF, MODEL = f"{ARR}.actor", f"{ARR}.ref", f"{ARR}.model"
TENSOR_PARALLEL = f"{ROLLOUT}.tensor_model_parallel_size"
REWARD = "reward_model"
"""Section of a reward model that the trainer runs itself, up to 0.6."""
REWARD_ENGINE = "reward.reward_model"
"""Section of a reward model in an engine, 0.7 and later."""
LORA_MERGE = f"{MODEL}.lora.merge"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What does not change while knobs are turned: the surroundings of one verl launch."""

    version: str
    behaviour: Behaviour
    engine_version: str
    """Of the policy's engine."""
    actor_model: ModelSpec
    critic_model: ModelSpec | None
    reward_model: ModelSpec | None = None
    teachers: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Teacher models by their name below distillation.teacher_models."""
    settings: Settings
    capacity_bytes: int
    budget_bytes: int
    margin: Margin
    held_bytes: int
    host_budget_bytes: int
    gpus_per_node: int
    nodes: int
    gpus_of_a_host: int | None = None
    """All GPUs that one host has, used or not; ``None``: not known."""
    flash_cross_entropy: bool = True
    placement: Placement = field(default_factory=Placement)

    @property
    def world_size(self) -> int:
        """GPUs of the trainer pool."""
        return self.gpus_per_node * self.nodes

    @property
    def engine_worlds(self) -> tuple[int, ...]:
        """GPUs of each pool that has engines of the policy."""
        own = (self.placement.world_size,) if self.placement.apart else ()
        return (self.world_size, *own) if self.placement.hybrid else own

    @property
    def engine_gpus_per_node(self) -> tuple[int, ...]:
        """GPUs of one node of each such pool."""
        own = (self.placement.gpus_per_node,) if self.placement.apart else ()
        return (self.gpus_per_node, *own) if self.placement.hybrid else own

    @property
    def share_keys(self) -> tuple[str, ...]:
        """Keys of the share that the policy's engines take of a GPU."""
        own = self.placement.share_key if self.placement.apart else FRACTION
        return tuple(dict.fromkeys((FRACTION, own))) if self.placement.hybrid else (own,)

    def engine_version_of(self, name: str) -> str:
        """Return the version of an inference engine: the one that is named or installed, else the newest that verl allows."""
        return defaults.engine_in_use(self.version, name, asked=self.settings.engine_version)

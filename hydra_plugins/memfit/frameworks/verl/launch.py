"""What does not change while knobs are turned: the surroundings of one verl launch, and the sections that its keys are in."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.frameworks.verl.versions import Behaviour
from hydra_plugins.memfit.model.spec import ModelSpec

ARR = "actor_rollout_ref"
ACTOR, REF, ROLLOUT, MODEL = f"{ARR}.actor", f"{ARR}.ref", f"{ARR}.rollout", f"{ARR}.model"
FRACTION = f"{ROLLOUT}.gpu_memory_utilization"
TENSOR_PARALLEL = f"{ROLLOUT}.tensor_model_parallel_size"
LORA_MERGE = f"{MODEL}.lora.merge"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What does not change while knobs are turned: the surroundings of one verl launch."""

    version: str
    behaviour: Behaviour
    engine_version: str
    actor_model: ModelSpec
    critic_model: ModelSpec | None
    settings: Settings
    capacity_bytes: int
    budget_bytes: int
    held_bytes: int
    host_budget_bytes: int
    gpus_per_node: int
    nodes: int
    flash_cross_entropy: bool = True

    @property
    def world_size(self) -> int:
        """GPUs of the trainer pool."""
        return self.gpus_per_node * self.nodes

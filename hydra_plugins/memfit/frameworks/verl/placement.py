"""Where the rollout engines are: on the trainer's GPUs, in a pool of their own, or both."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.verl.recipes import FULLY_ASYNC, RECIPES, recipe_of, versions
from hydra_plugins.memfit.frameworks.view import View

SEPARATE_ASYNC = "separate_async"
"""0.9's own trainer with a rollout pool: ``trainer.v1.trainer_mode``."""
ROLLOUT = "actor_rollout_ref.rollout"
FRACTION, STANDALONE_FRACTION = f"{ROLLOUT}.gpu_memory_utilization", f"{ROLLOUT}.standalone_gpu_memory_utilization"
_HYBRID_FLAGS = ("async_training.use_trainer_do_validate", "async_training.use_dynamic_resource_scheduling")
"""Either of them puts sleeping engines on the trainer's GPUs too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the rollout engines of one launch are."""

    entry: str | None = None
    """``fully_async``, ``one_step_off`` or ``separate_async``; ``None``: verl's ordinary trainer."""
    hybrid: bool = True
    """Engines sit on the trainer's GPUs, and sleep while it trains."""
    gpus_per_node: int = 0
    """GPUs of the rollout pool on one of its nodes; 0: there is no such pool."""
    nodes: int = 0
    share_key: str = FRACTION
    """Key of the engines' share in the rollout pool."""

    @property
    def world_size(self) -> int:
        """GPUs of the rollout pool."""
        return self.gpus_per_node * self.nodes

    @property
    def apart(self) -> bool:
        """Whether there is a rollout pool."""
        return self.world_size > 0


def read_placement(view: View, version: str) -> Placement:
    """Return the placement; raises `NotModelled` for a recipe that the release's wheel does not have."""
    recipe = recipe_of(name for name in ("async_training", "rollout") if view.section(name))
    if recipe is None:
        return _trainers_own(view)
    if version not in versions(recipe):
        raise NotModelled(
            f"{recipe}_policy in verl {version} is not modelled: its wheel has no such entry (known: "
            f"{', '.join(versions(recipe))}). Name your release with memfit.framework_version, or go on unplanned with "
            "memfit.strict=false."
        )
    is_async = recipe == FULLY_ASYNC
    return Placement(
        entry=recipe,
        hybrid=is_async and any(view.flag(key, False) for key in _HYBRID_FLAGS),
        gpus_per_node=view.integer("rollout.n_gpus_per_node", 8, minimum=0),
        nodes=view.integer("rollout.nnodes", 1, minimum=0),
        share_key=STANDALONE_FRACTION if is_async and _is_set(view, STANDALONE_FRACTION) else FRACTION,
    )


def _trainers_own(view: View) -> Placement:
    """verl's own trainer, which has a rollout pool in one of 0.9's modes only."""
    mode = view.text("trainer.v1.trainer_mode", "sync")
    if mode != SEPARATE_ASYNC or not view.flag("trainer.use_v1", False):
        return Placement()
    return Placement(
        entry=SEPARATE_ASYNC,
        hybrid=view.flag("actor_rollout_ref.hybrid_engine", True),
        gpus_per_node=view.integer(f"{ROLLOUT}.n_gpus_per_node", 8, minimum=0),
        nodes=view.integer(f"{ROLLOUT}.nnodes", 0, minimum=0),
    )


def _is_set(view: View, key: str) -> bool:
    return view.has(key) and view.raw(key) is not None


def refuse_empty_pool(view: View, placement: Placement) -> None:
    """Raise `ConfigError` where the entry needs a rollout pool and none is given."""
    if placement.entry is None or placement.apart:
        return
    if placement.entry == FULLY_ASYNC and placement.hybrid and not view.integer("rollout.nnodes", 1, minimum=0):
        return  # dynamic scheduling on the trainer's GPUs alone
    section = "rollout" if placement.entry in RECIPES else ROLLOUT
    raise ConfigError(
        f"{section}.nnodes={view.raw(f'{section}.nnodes')} x {section}.n_gpus_per_node="
        f"{view.raw(f'{section}.n_gpus_per_node')}: {placement.entry} needs GPUs of its own for the rollout. Write e.g. "
        f"{section}.nnodes=1 {section}.n_gpus_per_node=8."
    )


def blockers(view: View, placement: Placement, version: str) -> tuple[str, ...]:
    """Return what these entries assert before they start; each with the fix."""
    if placement.entry is None:
        return ()
    found = []
    backend = f"{ROLLOUT}.checkpoint_engine.backend"
    if placement.apart and view.text(backend, "naive") == "naive":
        found.append(f"{backend}=naive sends no weights to other GPUs. Write {backend}=nccl.")
    if placement.entry in RECIPES and version.startswith("0.8.") and view.flag("actor_rollout_ref.hybrid_engine", True):
        found.append(
            f"actor_rollout_ref.hybrid_engine=true: {placement.entry} of verl {version} asserts that it is false. Write "
            "actor_rollout_ref.hybrid_engine=false."
        )
    if placement.entry == FULLY_ASYNC:
        for key, needed in (("data.train_batch_size", 0), ("data.gen_batch_size", 1)):
            if view.raw(key) != needed:
                found.append(
                    f"{key}={view.raw(key)}: fully asynchronous training asserts {needed}. Write {key}={needed}."
                )
    if placement.entry == SEPARATE_ASYNC:
        found += _one_batch_a_cycle(view)
    return tuple(found)


def _one_batch_a_cycle(view: View) -> list[str]:
    batch, mini = (
        view.integer("data.train_batch_size", 1024),
        view.integer("actor_rollout_ref.actor.ppo_mini_batch_size", 256),
    )
    steps = view.integer("trainer.v1.separate_async.parameter_sync_step", 4)
    if batch == steps * mini:
        return []
    return [
        f"data.train_batch_size={batch} is not trainer.v1.separate_async.parameter_sync_step={steps} x "
        f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}: separate_async asserts that. Write e.g. "
        f"data.train_batch_size={steps * mini}."
    ]

"""verl: from the composed ppo_trainer config to a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.memfit.base.errors import NotModelled
from hydra_plugins.memfit.frameworks.verl import defaults, keys, knobs, others, pools, read, recipes, surroundings
from hydra_plugins.memfit.frameworks.verl.checks import (
    PLACEHOLDER,
    blockers,
    broken_heads,
    fixes,
    has_flash_attention,
    notes,
    refuse_values_for_sections,
    unset_micro_batches,
)
from hydra_plugins.memfit.frameworks.verl.choices import refuse_unknown_names, unknown_estimator
from hydra_plugins.memfit.frameworks.verl.engines import rollout_name
from hydra_plugins.memfit.frameworks.verl.launch import MODEL, Launch
from hydra_plugins.memfit.frameworks.verl.placement import read_placement, refuse_empty_pool
from hydra_plugins.memfit.frameworks.verl.versions import behaviour
from hydra_plugins.memfit.frameworks.verl.writable import WRITABLE_KEYS
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.pools import estimate
from hydra_plugins.memfit.planning.problem import Problem, remembered
from hydra_plugins.memfit.planning.segments import advice, cautioned

__all__ = ["WRITABLE_KEYS", "VerlAdapter"]


@dataclass(frozen=True)
class VerlAdapter(defaults.Releases):
    """Reads verl's ``main_ppo`` launches, FSDP and FSDP2, with a vLLM or SGLang rollout on the same GPUs."""

    name: str = "verl"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the config has verl's ``actor_rollout_ref`` section."""
        section = config.get("actor_rollout_ref")
        return isinstance(section, Mapping) and "actor" in section

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return verl's own config of that release, interpolations unresolved."""
        return defaults.load(defaults.pick_version(version))

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return verl's own config with the training backend, and the recipe, that the dotted keys in ``asked`` are for.

        Raises `NotModelled` for a backend whose config is not known.
        """
        engine = asked.get("model_engine", "dp")
        if engine not in ("dp", "megatron"):
            raise NotModelled(f"model_engine={engine} is not modelled; memfit knows the configs of dp and megatron.")
        is_megatron = engine == "megatron" or any("megatron" in key.split(".") for key in asked)
        known = defaults.pick_version(version)
        config = defaults.load(known, trainer="megatron" if is_megatron else "fsdp")
        return recipes.with_recipe(config, known, recipes.recipe_of(key.split(".")[0] for key in asked))

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the releases that have ``key``, in a yaml or in a dataclass only."""
        return keys.versions_with(key)

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config of one launch."""
        view = View(config)
        refuse_values_for_sections(view)
        launch = _launch(view, context)
        _refuse_unmodelled(view)
        needed = fixes(view, launch, pinned=context.pinned, explicit=context.explicit)
        forced = {change.key: change.new for change in needed}

        @remembered
        def predict(values: Mapping[str, object]) -> Estimate:
            turned = view.with_values({**forced, **values})
            prediction = estimate(pools.read(turned, launch))
            judged = replace(
                prediction,
                refusals=unset_micro_batches(turned, launch),
                shortfalls=(*prediction.shortfalls, *broken_heads(turned, launch)),
            )
            return cautioned(judged, launch.margin, capacity=launch.capacity_bytes, held=launch.held_bytes)

        return Problem(
            framework=self.name,
            framework_version=launch.version,
            hardware=context.hardware,
            model=launch.actor_model,
            gpus_per_node=launch.gpus_per_node,
            nodes=launch.nodes,
            settings=context.settings,
            margin=launch.margin,
            knobs=knobs.knobs(view.with_values(forced), launch),
            estimate=predict,
            composed=view.requested,
            fixes=needed,
            warnings=(
                *unknown_estimator(view, launch.version),
                *notes(view, launch, context),
                *_expandable_advice(launch, predict({})),
            ),
            composed_once=True,
            alike={
                "strategy": view.text("actor_rollout_ref.actor.strategy", "fsdp"),
                "engine": f"{rollout_name(view)} {'.'.join(launch.engine_version.split('.')[:2])}",
            },
            blockers=blockers(view, launch, context),
        )


def _expandable_advice(launch: Launch, asked: Estimate) -> tuple[str, ...]:
    """What a newer verl would give back; beside an engine's memory pool nobody else can switch expandable segments on."""
    if not launch.placement.hybrid:
        return ()
    how = "verl 0.6 and later use them in the trainer"
    return advice(asked, launch.margin, capacity=launch.capacity_bytes, how=how)


def _launch(view: View, context: Context) -> Launch:
    settings, hardware = context.settings, context.hardware
    surroundings.refuse_other_than_gpus(hardware)
    asked = settings.framework_version or defaults.installed_version()
    version = defaults.pick_version(asked)
    gpus, nodes = surroundings.gpus(view, context)
    refuse_unknown_names(view, version)
    placement = read_placement(view, version)
    refuse_empty_pool(view, placement)
    actor = surroundings.model(view, context, f"{MODEL}.path", context.model)
    known = behaviour(version, engine_workers=view.raw("trainer.use_legacy_worker_impl") == "disable")
    context = replace(context, expandable_segments=known.expandable_in_trainer and placement.hybrid)
    return Launch(
        version=version,
        behaviour=known,
        engine_version=defaults.engine_in_use(version, rollout_name(view), asked=settings.engine_version),
        actor_model=actor,
        critic_model=_critic_model(view, context, actor) if read.has_critic(view) else None,
        settings=settings,
        capacity_bytes=hardware.capacity_bytes,
        budget_bytes=context.budget_bytes,
        margin=context.margin,
        held_bytes=hardware.held_bytes,
        host_budget_bytes=context.host_budget_bytes,
        gpus_per_node=gpus,
        nodes=nodes,
        gpus_of_a_host=hardware.gpus_per_node,
        placement=placement,
        reward_model=others.reward_model(view, context, known),
        teachers=others.teachers(view, context),
        flash_cross_entropy=has_flash_attention(hardware)
        and context.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1",
    )


def _critic_model(view: View, context: Context, actor: ModelSpec) -> ModelSpec:
    """The critic's own path; verl's placeholder stands for the actor's architecture, unless the user wrote it."""
    key = "critic.model.path"
    if key not in context.explicit and view.composed(key) in (MISSING, None, PLACEHOLDER):
        return actor
    return surroundings.model(view, context, key, None, role="critic")


def _refuse_unmodelled(view: View) -> None:
    key = f"{MODEL}.mtp.enable"
    if view.raw(key) is True:
        raise NotModelled(
            f"{key}=true: multi-token prediction, in the trainer and in the engine, is not modelled yet. Launch without the "
            "hardware group, or go on unplanned with memfit.strict=false."
        )

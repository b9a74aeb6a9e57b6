"""AReaL: from the composed experiment config to a `Problem`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.areal import allocation, knobs, read, schema, versions
from hydra_plugins.memfit.frameworks.areal.allocation import Layout, Part
from hydra_plugins.memfit.frameworks.areal.checks import blockers, fixes, notes
from hydra_plugins.memfit.frameworks.areal.knobs import WRITABLE_KEYS
from hydra_plugins.memfit.frameworks.areal.read import Launch
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.allocator import asks_for_expandable
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.concurrent import estimate
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem, remembered
from hydra_plugins.memfit.planning.segments import advice, cautioned

__all__ = ["WRITABLE_KEYS", "ArealAdapter"]

_SIGNS = ("rollout", "gconfig", "allocation_mode", "train_dataset")
_SERVED = ("rollout", "gconfig", "sglang", "vllm")
"""Sections of a launch that generates."""
_LAUNCHERS = ("areal.launcher.", "areal.infra.launcher.")
"""Modules that start servers and trainer ranks, each of which composes the config again."""


@dataclass(frozen=True)
class ArealAdapter:
    """Reads AReaL's experiment configs: FSDP trainer, SGLang or vLLM servers, on the same or on other GPUs."""

    name: str = "areal"
    versions: tuple[str, ...] = versions.VERSIONS

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the config has a trainer's section as AReaL writes it, and what goes with it."""
        sections = [config.get(name) for name in ("actor", "model")]
        has_trainer = any(isinstance(s, Mapping) and ("mb_spec" in s or "path" in s) for s in sections)
        data = config.get("data")
        is_verls = "actor_rollout_ref" in config or (isinstance(data, Mapping) and "n_samples" in data)
        return has_trainer and any(sign in config for sign in _SIGNS) and not is_verls

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return the names of AReaL's sections; what they hold by default, the adapter knows for each release."""
        found = schema.keys(versions.VERSIONS[-1] if version == versions.ANY else versions.pick(version))
        return {key: {} for key in found if "." not in key} | {"gradient_checkpointing": None}

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return nothing below a whole config; below a few words the sections that such a launch always has."""
        del version
        if {"experiment_name", "actor.experiment_name", "train_dataset.path"} & set(asked):
            return {}
        named = {key.split(".")[0] for key in asked}
        layout = " ".join(str(asked.get(key, "")) for key in ("allocation_mode", "rollout.backend"))
        engine = "vllm" if "vllm" in layout or ("vllm" in named and "sglang" not in named) else "sglang"
        serves = named & set(_SERVED) or any(name in layout for name in allocation.ENGINES)
        sections = ["model" if "model" in named else "actor", "train_dataset"]
        return {name: {} for name in (*sections, *(("rollout", "gconfig", engine) if serves else ()))}

    def pick_version(self, asked: str | None) -> str:
        """Return the known release that stands for ``asked``, else for the installed one, else `versions.ANY`."""
        return versions.pick(asked) if asked else versions.installed() or versions.ANY

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the releases that have ``key``."""
        return schema.versions_with(key)

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config of one launch."""
        view = View(config)
        launch, guessed = _launch(view, context)
        _refuse_unmodelled(view, launch)
        needed = fixes(view, launch, pinned=context.pinned)
        forced = {change.key: change.new for change in needed}

        @remembered
        def predict(values: Mapping[str, object]) -> Estimate:
            prediction = estimate(read.read(view.with_values({**forced, **values}), launch))
            return cautioned(prediction, launch.margin, capacity=launch.capacity_bytes, held=launch.held_bytes)

        return Problem(
            framework=self.name,
            framework_version=launch.version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.gpus_per_node,
            nodes=launch.nodes,
            settings=context.settings,
            margin=launch.margin,
            knobs=knobs.knobs(view.with_values(forced), launch),
            estimate=predict,
            composed=view.requested,
            fixes=needed,
            warnings=(
                *context.hardware.warnings,
                *notes(view, launch, guessed=guessed),
                *_expandable_advice(view, launch, predict({})),
            ),
            alike={
                "strategy": launch.layout.trainer.name,
                "engine": launch.layout.server.name if launch.layout.server else "none",
                "placement": "shared" if launch.shares else "apart",
            },
            composed_once=not launch.server_first,  # a controller hands its workers plain values
            blockers=blockers(view, launch),
        )


def _expandable_advice(view: View, launch: Launch, asked: Estimate) -> tuple[str, ...]:
    """What expandable segments would give back, unless a server beside the trainer sleeps: they exclude its memory pool."""
    if view.flag("vllm.enable_sleep_mode", False) or view.flag("sglang.enable_memory_saver", False):
        return ()
    how = "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True where the trainer starts"
    return advice(asked, launch.margin, capacity=launch.capacity_bytes, how=how)


def _launch(view: View, context: Context) -> tuple[Launch, bool]:
    settings, hardware = context.settings, context.hardware
    if hardware.kind != "gpu":
        raise NotModelled(f"AReaL on {hardware.name} ({hardware.kind}) is not modelled; name a GPU: +hardware=h200.")
    asked = settings.framework_version or versions.installed() or versions.ANY
    picked = versions.pick(asked)
    version = versions.of_config(view) if picked == versions.ANY else picked
    section = "actor" if view.section("actor") or not view.section("model") else "model"
    layout = _layout(view)
    gpus, nodes = _gpus(view, context, layout)
    behaviour = versions.behaviour(version)
    context = replace(context, expandable_segments=asks_for_expandable(context.environ))
    launch = Launch(
        version=version,
        behaviour=behaviour,
        layout=layout or _default_layout(view, gpus * nodes),
        model=_model(view, context, f"{section}.path"),
        section=section,
        settings=settings,
        capacity_bytes=hardware.capacity_bytes,
        budget_bytes=context.budget_bytes,
        margin=context.margin,
        held_bytes=hardware.held_bytes,
        host_budget_bytes=context.host_budget_bytes,
        gpus_per_node=gpus,
        nodes=nodes,
        server_first=behaviour.launcher or _has_launcher(context),
    )
    return launch, picked == versions.ANY


def _has_launcher(context: Context) -> bool:
    """Whether a launcher starts servers and ranks: it marks the processes that it starts; itself it is the main module."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return context.environ.get("AREAL_SPMD_MODE") == "1" or (main is not None and main.name.startswith(_LAUNCHERS))


def _layout(view: View) -> Layout | None:
    """The layout that the config spells out: backend keys, else allocation_mode; ``None``: neither."""
    server, trainer = view.text("rollout.backend", ""), view.text("actor.backend", "")
    colocated = view.text("rollout.scheduling_strategy.type", "") == "colocation"
    if server and trainer:
        side = allocation.part(server, "rollout.backend", allocation.ENGINES, "sglang")
        return Layout(server=side, trainer=allocation.trainer(trainer, "actor.backend"), colocated=colocated)
    mode = view.text("allocation_mode", "")
    if mode:
        return allocation.mode(mode)
    if server or (trainer and ":" in trainer and _generates(view)):
        given, missing = ("rollout", "actor") if server else ("actor", "rollout")
        raise ConfigError(
            f"{given}.backend is set and {missing}.backend is not: AReaL needs both, for example "
            "rollout.backend=sglang:d1 actor.backend=fsdp:d1."
        )
    if trainer and ":" in trainer:
        return Layout(server=None, trainer=allocation.trainer(trainer, "actor.backend"))
    return None


def _generates(view: View) -> bool:
    return view.section("gconfig") or view.section("rollout")


def _default_layout(view: View, gpus: int) -> Layout:
    """Without a layout: one GPU is shared by one server and one trainer."""
    if gpus == 1:
        engine = "vllm" if view.section("vllm") and not view.section("sglang") else "sglang"
        return Layout(server=Part(name=engine) if _generates(view) else None, trainer=Part(name="fsdp"))
    raise ConfigError(
        f"the launch has {gpus} GPUs and no layout: neither allocation_mode nor rollout.backend and actor.backend are set. "
        f"Set e.g. allocation_mode=sglang:d{gpus // 2}+fsdp:d{gpus - gpus // 2} (up to 1.0.2), or "
        f"rollout.backend=sglang:d{gpus // 2} actor.backend=fsdp:d{gpus - gpus // 2}."
    )


def _gpus(view: View, context: Context, layout: Layout | None) -> tuple[int, int]:
    """GPUs of a node, and nodes: as told, as the config says, as the node shows, else as the layout needs."""
    nodes = context.nodes or view.integer("cluster.n_nodes", 1)
    present = context.hardware.gpus_per_node
    asked = view.optional_integer("cluster.n_gpus_per_node")
    if context.gpus_per_node:
        return context.gpus_per_node, nodes
    if asked is not None:
        return min(asked, present) if present and nodes == 1 else asked, nodes
    if layout is None:
        return present or 1, nodes
    needed = layout.trainer.world + (0 if layout.server is None or layout.colocated else layout.server.world)
    return present or -(-needed // nodes), nodes


def _model(view: View, context: Context, key: str) -> ModelSpec:
    if context.model is not None:
        return context.model
    path = view.text(key, "")
    if not path:
        raise ConfigError(
            f"{key} is not set, so the model is unknown. Set it, or add +model=qwen2.5-0.5b (console: --model)."
        )
    return context.resolve_model(path)


def _refuse_unmodelled(view: View, launch: Launch) -> None:
    go_on = "Launch without the hardware group, or go on unplanned with memfit.strict=false."
    if view.flag(f"{launch.section}.enable_tree_training", False):
        raise NotModelled(f"{launch.section}.enable_tree_training=true: tree training is not modelled. {go_on}")
    if view.section("teacher"):
        raise NotModelled(f"teacher: a teacher model beside the trainer is not modelled. {go_on}")

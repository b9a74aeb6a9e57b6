"""A verl launch read from the defaults that memfit embeds: the release's own yaml, with some values set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks.verl.adapter import VerlAdapter
from hydra_plugins.memfit.hardware.catalog import load as load_hardware
from hydra_plugins.memfit.model.resolve import load as load_model
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem

ARR = "actor_rollout_ref"
COMMON: Mapping[str, Any] = {
    "algorithm.adv_estimator": "grpo",
    f"{ARR}.rollout.name": "vllm",
    f"{ARR}.model.path": "qwen2.5-7b",
    f"{ARR}.actor.use_dynamic_bsz": True,
    "trainer.n_gpus_per_node": 8,
}


def read_problem(
    values: Mapping[str, Any],
    *,
    version: str = "0.9.1",
    hardware: str = "a100-80",
    pinned: frozenset[str] = frozenset(),
    resolve: Callable[[str], ModelSpec] = load_model,
    **settings: Any,
) -> Problem:
    """Return what memfit reads in ``values`` (dotted keys) on top of `COMMON`; recipes are chosen by their keys."""
    asked = {**COMMON, **values}
    config = OmegaConf.create(dict(VerlAdapter().defaults_with(version, asked)))
    for key, value in asked.items():
        OmegaConf.update(config, key, value, force_add=True)
    context = Context(
        hardware=load_hardware(hardware),
        settings=Settings(framework_version=version, **settings),
        resolve_model=resolve,
        pinned=pinned,
        explicit=frozenset(values),
    )
    return VerlAdapter().problem(plain(config), context)

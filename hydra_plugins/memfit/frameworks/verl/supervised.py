"""verl's supervised fine-tuning: from the composed config to a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.memfit.frameworks.verl import defaults, supervised_keys
from hydra_plugins.memfit.frameworks.verl.supervised_knobs import (
    WRITABLE_KEYS,
    blockers,
    broken_heads,
    fixes,
    knobs,
    notes,
)
from hydra_plugins.memfit.frameworks.verl.supervised_read import read_launch, read_run
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem, remembered
from hydra_plugins.memfit.planning.segments import advice, cautioned
from hydra_plugins.memfit.planning.supervised import estimate

__all__ = ["NAME", "WRITABLE_KEYS", "VerlSupervisedAdapter"]

NAME = "verl-sft"
_SECTIONS = ("data", "model", "optim", "trainer")
_EXPANDABLE = "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True where torchrun starts"


@dataclass(frozen=True)
class VerlSupervisedAdapter(defaults.Releases):
    """Reads the launches of verl's ``sft_trainer`` and ``fsdp_sft_trainer``."""

    name: str = NAME

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the config has the sections of one of the entries, and a model where that entry reads it."""
        if "actor_rollout_ref" in config or not all(isinstance(config.get(name), Mapping) for name in _SECTIONS):
            return False
        engine = config.get("engine")
        return "partial_pretrain" in config["model"] or (isinstance(engine, Mapping) and "strategy" in engine)

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return the config of the newest entry of that release."""
        return self.defaults_with(version, {})

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config of the entry that the dotted keys in ``asked`` are for; raises `ConfigError`."""
        known = defaults.pick_version(version)
        return supervised_keys.load(known, supervised_keys.entry_for(known, asked))

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the releases in which one of the entries has ``key``."""
        return supervised_keys.versions_with(key)

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config of one launch; raises `ConfigError` and `NotModelled`."""
        launch = read_launch(View(config), context)
        needed = fixes(launch, context.pinned)
        turned = launch.turned({change.key: change.new for change in needed})
        margin = launch.context.margin

        @remembered
        def predict(values: Mapping[str, object]) -> Estimate:
            asked = turned.turned(values)
            judged = replace(estimate(read_run(asked)), shortfalls=broken_heads(asked))
            hardware = context.hardware
            return cautioned(judged, margin, capacity=hardware.capacity_bytes, held=hardware.held_bytes)

        return Problem(
            framework=self.name,
            framework_version=launch.version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.gpus_per_node,
            nodes=launch.nodes,
            settings=context.settings,
            margin=margin,
            knobs=tuple(knobs(turned)),
            estimate=predict,
            composed=launch.view.requested,
            fixes=needed,
            warnings=(
                *notes(launch),
                *advice(predict({}), margin, capacity=context.hardware.capacity_bytes, how=_EXPANDABLE),
            ),
            blockers=blockers(launch),
        )

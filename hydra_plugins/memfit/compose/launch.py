"""One composed launch: what it asks for, what is pinned, and the plan for it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.compose.handover import hardware_of
from hydra_plugins.memfit.compose.learned import with_lessons
from hydra_plugins.memfit.compose.overrides import Order
from hydra_plugins.memfit.compose.plain import ABSENT, leaves, value_at
from hydra_plugins.memfit.compose.settings import read_settings
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Plan, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A composed config, taken apart."""

    config: Mapping[str, Any]
    """The framework's own part, plain: without the nodes ``hydra`` and ``memfit``."""
    node: Mapping[str, Any]
    """The ``memfit`` node, plain."""
    order: Order
    gpus_per_node: int | None = None
    """From the console's ``--gpus``; ``None``: the config's own count."""
    nodes: int | None = None

    def plan(self) -> Plan:
        """Return the plan; raises `MemfitError`, and `NoPlanFits` when nothing fits."""
        from hydra_plugins.memfit.planning.search import make_plan

        problem, pinned = self.problem()
        return make_plan(problem, pinned=pinned)

    def problem(self) -> tuple[Problem, frozenset[str]]:
        """Return what the planner is given, and the keys that it must not touch; raises `MemfitError`."""
        from hydra_plugins.memfit.frameworks import registry

        settings = read_settings(self.node)
        pinned = self.order.pinned | pinned_by(settings.pin, self.config)
        adapter = registry.adapter(settings.framework) if settings.framework else registry.recognise(self.config)
        context = self._context(settings, pinned)
        problem = with_lessons(
            adapter.problem(self.config, context),
            is_own_margin=settings.margin is not None,
            environ=os.environ,
            again=lambda margin: adapter.problem(
                self.config, replace(context, settings=replace(settings, margin=margin))
            ),
        )
        assumed = registry.assumes_version(adapter.name, settings.framework_version)
        problem = replace(problem, version_assumed=assumed) if assumed else problem
        return problem, pinned | _knobs_below(settings.pin, problem)

    def _context(self, settings: Settings, pinned: frozenset[str]) -> Context:
        from hydra_plugins.memfit.model.resolve import from_mapping, resolve_model

        own = frozenset(key for key in self.order.settings if key.startswith("memfit.hardware."))
        model = self.node.get("model")
        return Context(
            hardware=hardware_of(self.node.get("hardware"), own, os.environ, _ray_address(self.config)),
            settings=settings,
            resolve_model=partial(resolve_model, environ=os.environ),
            model=from_mapping(model) if model else None,
            gpus_per_node=self.gpus_per_node,
            nodes=self.nodes,
            environ=dict(os.environ),
            pinned=pinned,
            explicit=self.order.explicit,
        )


def _ray_address(config: Mapping[str, Any]) -> str | None:
    """Return the Ray cluster that the config names (verl since 0.6: ``ray_kwargs.ray_init.address``; before: ``ray_init``)."""
    found = (value_at(config, f"{section}.address") for section in ("ray_kwargs.ray_init", "ray_init"))
    return next((address for address in found if isinstance(address, str)), None)


def pinned_by(pins: Sequence[str], config: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys at and below ``pins`` in the plain ``config``; raises `ConfigError` for an unknown pin."""
    keys: set[str] = set()
    for pin in pins:
        value = value_at(config, pin)
        if value is ABSENT:
            close = difflib.get_close_matches(pin, list(leaves(config)), n=3)
            hint = f" Close to it: {', '.join(close)}." if close else ""
            raise ConfigError(f"memfit.pin names {pin!r}, and the config has no such key.{hint}")
        keys.update(leaves(value, pin))
    return frozenset(keys)


def _knobs_below(pins: Sequence[str], problem: Problem) -> frozenset[str]:
    """Return the knobs in pinned sections: a knob may stand for a key that the config does not have yet."""
    return frozenset(k.key for k in problem.knobs for pin in pins if k.key == pin or k.key.startswith(f"{pin}."))

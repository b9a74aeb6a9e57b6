"""Any JAX runner that says which of its keys are which: ``memfit.framework=jax`` and ``memfit.mapping``.

    memfit.mapping.model=model.path                      model directory or hub id (or give +model=)
    memfit.mapping.micro_batch_size=train.per_device     sequences of one device in one forward and backward pass
    memfit.mapping.tokens=train.max_length               padded tokens of one sequence
    memfit.mapping.accumulation_steps=train.accumulate   optional: passes between two optimizer steps
    memfit.mapping.batch_size=train.batch                optional: sequences of one device between two optimizer steps
    memfit.mapping.optimizer / remat / mesh              optional: lion, adamw or sgd; see memory/xla_training.py; "dp,fsdp,tp"

A smaller micro-batch leaves training as it is only where the rest is accumulated. With ``accumulation_steps`` the plan raises
it in step; with ``batch_size`` alone the runner is taken to accumulate until that is reached; with neither, a smaller
micro-batch is a smaller batch, and is left alone without ``memfit.allow_semantic``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks import xla
from hydra_plugins.memfit.frameworks.view import View, listable
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.memory.xla_training import MOMENTS, REMAT, XlaStep
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Knob, Problem

REQUIRED = ("micro_batch_size", "tokens")
OPTIONAL = ("model", "accumulation_steps", "batch_size", "optimizer", "remat", "mesh")
VERSION = "any"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    view: View
    context: Context
    model: ModelSpec
    slice: xla.Slice

    def key(self, name: str) -> str | None:
        """Return the app's key for ``name``, or ``None`` where it declares none."""
        return self.context.settings.mapping.get(name)

    def count(self, name: str, view: View) -> int | None:
        """Return the whole number under the app's key, ``None`` where there is no key or no value."""
        key = self.key(name)
        return view.optional_integer(key) if key else None

    def text(self, name: str, default: str, valid: tuple[str, ...] = ()) -> str:
        """Return the text under the app's key; raises `ConfigError` for one that is not valid."""
        key = self.key(name)
        value = view_text(self.view, key) if key else None
        if value is not None and valid and value not in valid:
            raise ConfigError(f"{key}={value} is not modelled on TPU; known: {', '.join(valid)}.")
        return value or default

    @property
    def batch(self) -> int:
        """Sequences of one device between two optimizer steps, as the config asks for them."""
        own = self.count("batch_size", self.view)
        return own or self.micro(self.view) * (self.count("accumulation_steps", self.view) or 1)

    def micro(self, view: View) -> int:
        """Return the sequences of one device in one pass; raises `ConfigError` where the key holds none."""
        found = self.count("micro_batch_size", view)
        if found is None:
            key = self.context.settings.mapping["micro_batch_size"]
            raise ConfigError(f"{key} (memfit.mapping.micro_batch_size) has no value; give it one, e.g. {key}=1")
        return found

    @property
    def mesh(self) -> xla.Mesh:
        """Sizes of (dp, fsdp, tp); the state sharded over all devices where the app declares no mesh."""
        return xla.read_mesh(self.text("mesh", "1,-1,1"), self.key("mesh") or "mesh", self.slice)

    def estimate(self, values: Mapping[str, object]) -> Estimate:
        """Return the prediction for ``values`` by the app's keys."""
        view, mesh = self.view.with_values(values), self.mesh
        micro = self.micro(view)
        step = XlaStep(
            model=self.model,
            separate_head=False,
            data_parallel=mesh[0],
            shards=mesh[1] * mesh[2],
            tensor_parallel=mesh[2],
            sequences=micro,
            tokens=self.count("tokens", view) or 0,
            optimizer=self.text("optimizer", "adamw", tuple(MOMENTS)),
            accumulates=micro < self.batch,
            remat=self.text("remat", REMAT[0], REMAT),
        )
        phase, notes = xla.train_phase(step, mesh, self.context)
        return Estimate(phases=(phase,), notes=notes)

    def steps_for(self, micro: object) -> dict[str, object]:
        """Return the accumulation steps that keep the batch when a pass holds ``micro`` sequences."""
        key = self.key("accumulation_steps")
        return {key: ceil_div(self.batch, micro)} if key and isinstance(micro, int) else {}


def view_text(view: View, key: str) -> str | None:
    """Return a text or ``None``; a section is not a text."""
    value = view.raw(key)
    return value if isinstance(value, str) else None


class JaxAdapter:
    """A JAX runner whose keys the user has named."""

    name = "jax"
    versions = (VERSION,)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Never: nothing in a config says that it is a JAX runner's. ``memfit.framework=jax`` does."""
        del config
        return False

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return nothing: the runner is the user's own."""
        del version
        return {}

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the launch; raises `ConfigError` for a mapping that is not complete, with what is missing."""
        view = View(config)
        _check_mapping(view, context)
        path = view_text(view, context.settings.mapping["model"]) if "model" in context.settings.mapping else None
        launch = _Launch(
            view=view,
            context=context,
            model=xla.model_of(context, path or ""),
            slice=xla.slice_of(context),
        )
        return Problem(
            framework=self.name,
            framework_version=VERSION,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.slice.per_host,
            nodes=launch.slice.hosts,
            settings=context.settings,
            margin=context.margin,
            knobs=tuple(_knobs(launch)),
            estimate=launch.estimate,
            warnings=tuple(_warnings(launch)),
            blockers=xla.indivisible(launch.model, launch.mesh),
        )


def _check_mapping(view: View, context: Context) -> None:
    mapping = context.settings.mapping
    unknown = sorted(set(mapping) - {*REQUIRED, *OPTIONAL})
    missing = [name for name in REQUIRED if name not in mapping]
    if context.model is None and "model" not in mapping:
        missing.append("model")
    if unknown or missing:
        what = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise ConfigError(
            f"memfit.mapping {what}. Names: {', '.join((*REQUIRED, *OPTIONAL))}. Example: "
            "+memfit.mapping.micro_batch_size=train.per_device_batch +memfit.mapping.tokens=train.max_length"
        )
    for name, key in mapping.items():
        if not view.has(key):
            raise ConfigError(f"memfit.mapping.{name} names {key}, and the config has no such key.")


def _knobs(launch: _Launch) -> list[Knob]:
    micro, batch = launch.micro(launch.view), launch.batch
    key, steps = launch.context.settings.mapping["micro_batch_size"], launch.key("accumulation_steps")
    keeps = (steps is not None and steps not in launch.context.pinned) or launch.key("batch_size") is not None
    sizes = [n for n in range(listable(max(micro, batch), key), 0, -1) if not keeps or batch % n == 0]
    knob = Knob(
        key=key,
        requested=micro,
        candidates=tuple(n for n in sizes if n < micro),
        fast=tuple(n for n in sizes if n > micro) if keeps else (),
        cost=10,
        kind="neutral" if keeps else "semantic",
        why="sequences in a pass; the rest of the batch is accumulated"
        if keeps
        else "fewer sequences: a smaller batch",
        companions=launch.steps_for if keeps else None,
    )
    knobs = [knob]
    if steps is not None:
        now = launch.count("accumulation_steps", launch.view)
        knobs.append(
            Knob(
                key=steps, requested=now, candidates=(), cost=11, why="the batch of an optimizer step stays what it is"
            )
        )
    return knobs


def _warnings(launch: _Launch) -> list[str]:
    said = list(launch.context.hardware.warnings)
    if launch.key("remat") is None:
        said.append(f"memfit.mapping.remat is not given: {REMAT[0]} is assumed, which saves the most")
    return said

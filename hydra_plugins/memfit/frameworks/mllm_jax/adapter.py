"""MLLM-JAX's GRPO runner: from its keys to the knobs that it has, and the prediction for any setting of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks import xla
from hydra_plugins.memfit.frameworks.mllm_jax import keys
from hydra_plugins.memfit.frameworks.mllm_jax.batch import BUCKETS, Batch, split
from hydra_plugins.memfit.frameworks.mllm_jax.keys import Request
from hydra_plugins.memfit.memory import xla_training
from hydra_plugins.memfit.memory.breakdown import Estimate, MemoryBreakdown, PhaseEstimate, Shortfall
from hydra_plugins.memfit.memory.xla_training import MOMENTS, REMAT, XlaStep
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Change, Knob, Problem

AUTO = "auto"
"""Version: the commit that the keys of the config belong to."""
_MESH_COST, _MICRO_COST, _SEMANTIC_COST = 10, 20, 100
_TIED_SINCE_BRANCH = "the runner keeps lm_head apart from the embedding whatever the checkpoint says"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """One config, read."""

    request: Request
    context: Context
    model: ModelSpec
    slice: xla.Slice

    def with_values(self, values: Mapping[str, object]) -> _Launch:
        """Return the launch with other values by config key."""
        named: dict[str, Any] = {name: values[key] for name, key in self.request.key.items() if key in values}
        return replace(self, request=replace(self.request, **named))

    def estimate(self, values: Mapping[str, object]) -> Estimate:
        """Return the prediction for ``values`` by config key; a batch that the runner would refuse does not fit."""
        launch = self.with_values(values)
        try:
            return launch.predict(split(launch.request, launch.slice))
        except ConfigError as refusal:
            if not values:
                raise
            found = launch.predict(split(_whole(launch.request), launch.slice))
            return replace(found, shortfalls=(Shortfall(phase="train_step", num_bytes=1, why=str(refusal)),))

    def predict(self, batch: Batch) -> Estimate:
        """Return the two phases of a step."""
        mesh, engine = self.mesh, self.engine
        step = self.step(batch, mesh)
        generation = xla_training.rollout(
            step,
            sequences=batch.rollout_per_device,
            prefill_tokens=batch.prefill_tokens,
            decode_tokens=batch.decode_tokens,
        )
        rollout = PhaseEstimate(
            name="rollout", trainer=generation, engine=engine, budget_bytes=xla.budget(self.context)
        )
        training, notes = xla.train_phase(step, mesh, self.context, engine)
        return Estimate(phases=(rollout, training), notes=notes)

    @property
    def mesh(self) -> xla.Mesh:
        """Sizes of (dp, fsdp, tp)."""
        return xla.read_mesh(self.request.mesh, self.request.key["mesh"], self.slice)

    @property
    def engine(self) -> MemoryBreakdown:
        """A second engine on the same devices holds its own bf16 weights; the runner's own sampler uses the trainer's."""
        if self.request.backend == "naive":
            return MemoryBreakdown()
        return MemoryBreakdown(weights=xla_training.engine_weight_bytes(self.model, devices=self.slice.count))

    def step(self, batch: Batch, mesh: xla.Mesh) -> XlaStep:
        """Return the training step of one micro-batch."""
        return XlaStep(
            model=self.model,
            separate_head=True,
            data_parallel=mesh[0],
            shards=mesh[1] * mesh[2],
            tensor_parallel=mesh[2],
            sequences=batch.update_per_device,
            tokens=batch.tokens,
            optimizer=self.request.optimizer,
            accumulates=batch.accumulates,
            reference=self.request.beta != 0,
            remat=self.request.remat,
        )


def _whole(request: Request) -> Request:
    """Return the request with its batch in one piece."""
    return replace(request, micro=None, micro_per_device=None)


class MllmJaxAdapter:
    """The GRPO runner of MLLM-JAX on one TPU slice."""

    name = "mllm-jax"
    versions = (keys.SWEEP, keys.SPLIT, keys.NEWEST)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the keys are this runner's."""
        return keys.names(config)

    def pick_version(self, asked: str | None) -> str:
        """Return the version asked for, or `AUTO`; raises `ConfigError` for an unknown one."""
        if asked not in (None, AUTO, *self.versions):
            raise ConfigError(
                f"mllm-jax version {asked!r} is not known. Commits of the runner: {', '.join(self.versions)}."
            )
        return asked or AUTO

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return nothing: which defaults hold depends on the layout of the given keys, and reading knows them."""
        del version
        return {}

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the versions that may read ``key``; `AUTO` among them, because its keys choose the version."""
        commits = keys.commits(key)
        return (*commits, AUTO) if commits else ()

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the launch; raises `ConfigError` or `NotModelled` with the key, the value and the fix."""
        asked = context.settings.framework_version
        version = None if asked in (None, AUTO) else self.pick_version(asked)
        request = keys.read(config, context.environ, version)
        _refuse_other_runners(config, request)
        launch = _Launch(
            request=request,
            context=context,
            model=xla.model_of(context, request.model),
            slice=xla.slice_of(context),
        )
        batch = split(request, launch.slice)
        padded = tuple(_fixes(request, batch))
        return Problem(
            framework=self.name,
            framework_version=request.version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.slice.per_host,
            nodes=launch.slice.hosts,
            settings=context.settings,
            margin=context.margin,
            knobs=tuple(_knobs(launch, batch)),
            estimate=launch.estimate,
            fixes=() if context.pinned & {c.key for c in padded} else padded,
            warnings=(*_warnings(launch, batch), *(c.why for c in padded if c.key in context.pinned)),
            blockers=xla.indivisible(launch.model, launch.mesh),
        )


def _refuse_other_runners(config: Mapping[str, Any], request: Request) -> None:
    rollout = config.get("rollout")
    if isinstance(rollout, Mapping) and "prompt_batch_size" in rollout:
        raise NotModelled(
            "rollout.prompt_batch_size belongs to the SID runner of MLLM-JAX; memfit models its GRPO runner only."
        )
    for name, value, valid in (("optimizer", request.optimizer, tuple(MOMENTS)), ("remat", request.remat, REMAT)):
        if value not in valid:
            raise NotModelled(f"{request.key[name]}={value} is not modelled on TPU; known: {', '.join(valid)}.")


def _fixes(request: Request, batch: Batch) -> list[Change]:
    """The runner itself raises the completions until the devices can share them; say so before it does."""
    if request.completions == batch.completions:
        return []
    why = (
        f"the runner pads {request.prompts * request.completions} sequences to {batch.local}, a multiple of its devices"
    )
    return [
        Change(key=request.key["completions"], old=request.completions, new=batch.completions, kind="semantic", why=why)
    ]


def _knobs(launch: _Launch, batch: Batch) -> list[Knob]:
    return [*_mesh_knob(launch), *_micro_knobs(launch, batch), *_semantic_knobs(launch, batch)]


def _mesh_knob(launch: _Launch) -> list[Knob]:
    if launch.mesh[0] == 1:
        return []
    why = "one copy of the state over all hosts, not one a host"
    return [
        Knob(
            key=launch.request.key["mesh"],
            requested=launch.request.mesh,
            candidates=("1,-1,1",),
            cost=_MESH_COST,
            why=why,
        )
    ]


def _micro(launch: _Launch) -> tuple[str, int]:
    """Return the name of the micro-batch of this version, and the sequences of one device that its 1 stands for."""
    request = launch.request
    of_host = request.micro or (request.version == keys.SPLIT and not request.micro_per_device)
    return ("micro", launch.slice.per_host) if of_host else ("micro_per_device", 1)


def _micro_knobs(launch: _Launch, batch: Batch) -> list[Knob]:
    """Smaller micro-batches, where the runner has them: its gradient is a mean over all tokens of the batch."""
    request = launch.request
    if request.version == keys.SWEEP:
        return []
    name, unit = _micro(launch)
    now, whole = batch.update_per_device, batch.rollout_per_device
    sizes = [n for n in range(whole, 0, -1) if whole % n == 0]
    return [
        Knob(
            key=request.key[name],
            requested=getattr(request, name),
            candidates=tuple(n * unit for n in sizes if n < now),
            fast=tuple(n * unit for n in sizes if n > now),
            cost=_MICRO_COST,
            why="sequences in a micro-batch; the rest of the batch is accumulated",
        )
    ]


def _semantic_knobs(launch: _Launch, batch: Batch) -> list[Knob]:
    """Fewer completions, then fewer prompts, then shorter sequences: each keeps the local batch shareable by the devices."""
    request, per_host = launch.request, launch.slice.per_host
    prompts = request.prompts if request.version != keys.NEWEST else -(-request.prompts // launch.slice.hosts)
    unit = launch.slice.hosts if request.version == keys.NEWEST else 1
    fewer = [n for n in range(batch.completions - 1, 1, -1) if n * prompts % per_host == 0]
    groups = [n * unit for n in range(prompts - 1, 0, -1) if n * batch.completions % per_host == 0]
    shorter = [size for size in reversed(BUCKETS) if size < batch.prefill_tokens]
    briefer = [size for size in reversed(BUCKETS) if size < batch.decode_tokens]
    table = (
        ("completions", fewer, "fewer completions per prompt: the batch of an update gets smaller"),
        ("prompts", groups, "fewer prompts in a step: the batch of an update gets smaller"),
        ("prompt_tokens", shorter, "shorter prompts: the next smaller bucket"),
        ("response_tokens", briefer, "shorter responses: the next smaller bucket"),
    )
    return [
        Knob(
            key=request.key[name],
            requested=getattr(request, name),
            candidates=tuple(values),
            cost=_SEMANTIC_COST + rank,
            kind="semantic",
            why=why,
            companions=partial(_still_divides, launch, name) if request.micro or request.micro_per_device else None,
        )
        for rank, (name, values, why) in enumerate(table)
        if values
    ]


def _still_divides(launch: _Launch, name: str, value: object) -> dict[str, object]:
    """Return the micro-batch that a batch changed by ``name`` can be split into: at most the one that is asked for."""
    micro, unit = _micro(launch)
    smaller = replace(_whole(launch.request), **{name: value})  # type: ignore[arg-type]
    whole = split(smaller, launch.slice).rollout_per_device
    asked = getattr(launch.request, micro) // unit
    return {launch.request.key[micro]: unit * max(n for n in range(1, min(asked, whole) + 1) if whole % n == 0)}


def _warnings(launch: _Launch, batch: Batch) -> list[str]:
    request = launch.request
    said = [*request.warnings, *launch.context.hardware.warnings]
    if request.version == keys.SWEEP:
        said.append(
            f"the runner at {keys.SWEEP} has no key that splits a batch without changing training; from {keys.SPLIT} on "
            "train.micro_batch_size (later train.micro_batch_size_per_device) does"
        )
    if request.accumulation > 1 and request.version == keys.SWEEP:
        said.append(
            f"{request.key['accumulation']}={request.accumulation} splits nothing at {keys.SWEEP}: it costs "
            "4 bytes a parameter and saves none"
        )
    if launch.model.tie_word_embeddings:
        said.append(_TIED_SINCE_BRANCH)
    if request.backend != "naive":
        said.append(f"of the colocated engine {request.backend} only the weights are counted, not its KV cache")
    padded = (batch.prefill_tokens, request.prompt_tokens), (batch.decode_tokens, request.response_tokens)
    if any(size != asked for size, asked in padded):
        said.append(
            f"lengths are padded to buckets: {request.prompt_tokens} + {request.response_tokens} tokens become "
            f"{batch.prefill_tokens} + {batch.decode_tokens}"
        )
    return said

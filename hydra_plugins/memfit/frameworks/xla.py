"""What the two JAX adapters share: the slice, the mesh, and the phases of a launch on it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.memory import xla_training
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.memory.xla_training import XlaStep
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context

Mesh = tuple[int, int, int]
"""Sizes of the axes (dp, fsdp, tp)."""
DECODERS = ("qwen2", "qwen3", "llama", "mistral")
"""``model_type`` of the decoders whose step the formulas describe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The devices of one launch."""

    hosts: int
    per_host: int

    @property
    def count(self) -> int:
        """All devices of the slice."""
        return self.hosts * self.per_host


def slice_of(context: Context) -> Slice:
    """Return the devices of the launch; raises `NotModelled` for a GPU and `ConfigError` for a slice of unknown size."""
    hardware = context.hardware
    if hardware.kind != "tpu":
        raise NotModelled(
            f"{hardware.name} is a GPU, and memfit models JAX runs on TPU slices only. Use +hardware=v4-16 or another slice."
        )
    per_host, hosts = context.gpus_per_node or hardware.gpus_per_node, context.nodes or hardware.nodes
    if per_host is None:
        raise ConfigError(
            f"{hardware.name}: the devices of a host are not known; give --gpus 4, or memfit.hardware.gpus_per_node=4"
        )
    return Slice(hosts=hosts or 1, per_host=per_host)


def read_mesh(text: str, key: str, devices: Slice) -> Mesh:
    """Return the mesh of ``dp,fsdp,tp`` with at most one -1 for the rest, or of ``auto`` (a replica a host)."""
    if text.strip() == "auto":
        return (devices.hosts, devices.per_host, 1)
    example = f"{key}='1,-1,1'"
    try:
        dims = [int(part) for part in text.split(",")]
    except ValueError:
        dims = []
    if len(dims) != 3 or dims.count(-1) > 1 or any(d < 1 for d in dims if d != -1):
        raise ConfigError(
            f"{key} is {text!r}; it must be auto or three numbers dp,fsdp,tp, one of them may be -1: {example}"
        )
    if -1 in dims:
        dims[dims.index(-1)] = max(1, devices.count // -prod(dims))
    if prod(dims) != devices.count:
        raise ConfigError(f"{key}={text} has {prod(dims)} places for {devices.count} devices. Use {example}")
    return (dims[0], dims[1], dims[2])


def model_of(context: Context, path: str) -> ModelSpec:
    """Return the architecture; raises `NotModelled` for one whose step the formulas do not describe."""
    model = context.model or context.resolve_model(path)
    if model.model_type not in DECODERS or model.num_experts or model.vision_parameters or model.kv_lora_rank:
        raise NotModelled(
            f"{model.name} is a {model.model_type}; on TPU memfit models dense decoders of type {', '.join(DECODERS)}."
        )
    return model


def indivisible(model: ModelSpec, mesh: Mesh) -> tuple[str, ...]:
    """Say which dimension of the model the fsdp axis cannot divide: JAX refuses such a sharding."""
    dims = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
    }
    return tuple(
        f"{name} {size} of {model.name} cannot be sharded over fsdp={mesh[1]}; choose a mesh whose fsdp divides it"
        for name, size in dims.items()
        if size % mesh[1]
    )


def budget(context: Context) -> int:
    """Return the bytes of one device that a phase may use."""
    hardware = context.hardware
    return int(hardware.capacity_bytes * (1 - context.margin.share)) - hardware.held_bytes


def train_phase(
    step: XlaStep, mesh: Mesh, context: Context, engine: MemoryBreakdown | None = None
) -> tuple[PhaseEstimate, tuple[str, ...]]:
    """Return the phase ``train_step`` and notes about it: the closed form, or the compiler's verdict with ``memfit.exact``."""
    closed = PhaseEstimate(
        name="train_step",
        trainer=xla_training.train_step(step),
        engine=engine or MemoryBreakdown(),
        budget_bytes=budget(context),
    )
    if not context.settings.exact:
        return closed, ()
    from hydra_plugins.memfit.exact.settle import settle  # lazy: only who asks the compiler pays for it

    settled, note = settle(closed, step, mesh=mesh, hardware=context.hardware, environ=context.environ)
    return settled, (note,)

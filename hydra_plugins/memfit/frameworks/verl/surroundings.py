"""What each of verl's entries is asked first: on which GPUs, and for which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from hydra_plugins.memfit.base.errors import ConfigError, ModelNotFound, NotModelled
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context

T = TypeVar("T", bound="EntryLaunch")


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryLaunch:
    """A launch of one of verl's smaller entries; ``overrides`` are the values that the plan has set so far."""

    view: View
    overrides: Mapping[str, object]
    context: Context
    version: str
    model: ModelSpec
    gpus_per_node: int
    nodes: int

    def turned(self: T, values: Mapping[str, object]) -> T:
        """Return the launch with some keys set to other values."""
        overrides = {**self.overrides, **values}
        return replace(self, view=self.view.with_values(overrides), overrides=overrides)

    @property
    def world_size(self) -> int:
        """GPUs of the launch."""
        return self.gpus_per_node * self.nodes


def ulysses_sizes(
    model: ModelSpec, *, above: int, gpus_per_node: int, world_size: int, sequences: int
) -> tuple[int, ...]:
    """
    Return the sequence parallel sizes above one that verl takes.

    The GPUs of a node and the heads divide, and the data-parallel ranks that are left share out ``sequences``.
    """
    return tuple(
        size
        for size in (2, 4, 8)
        if size > above
        and gpus_per_node % size == 0
        and shares_heads(model, size)
        and sequences % (world_size // size) == 0
    )


def shares_heads(model: ModelSpec, size: int) -> bool:
    """Whether ``size`` ranks of Ulysses can share out the heads (verl ``models/transformers/monkey_patch.py``, every release)."""
    kv_heads = model.num_key_value_heads
    return model.num_attention_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def refuse_other_than_gpus(hardware: Hardware) -> None:
    """Raise `NotModelled` for hardware that verl's FSDP and Megatron workers do not run on."""
    if hardware.kind != "gpu":
        raise NotModelled(
            f"verl on {hardware.name} ({hardware.kind}) is not modelled; name a GPU, e.g. +hardware=h200."
        )


def gpus(view: View, context: Context) -> tuple[int, int]:
    """Return GPUs of a node, and nodes; raises `ConfigError` where the node that was looked at has fewer."""
    asked = view.integer("trainer.n_gpus_per_node", 8)
    found = context.gpus_per_node or asked
    nodes = context.nodes or view.integer("trainer.nnodes", 1)
    present = context.hardware.gpus_per_node
    if present is not None and found > present:
        raise ConfigError(
            f"trainer.n_gpus_per_node={found}, but this node shows {present} "
            f"({context.hardware.product}, {context.hardware.source}). Set trainer.n_gpus_per_node={present}, or name the "
            f"hardware of the node that will run it, e.g. +hardware={context.hardware.name}."
        )
    return found, nodes


def model(view: View, context: Context, key: str, given: ModelSpec | None, *, role: str = "") -> ModelSpec:
    """
    Return the architecture that was ``given``, else that of the path at ``key``; raises `ConfigError` without one.

    ``role``: what the model is where it is not the policy; ``memfit.models.<role>`` names its architecture.
    """
    named = context.settings.models.get(role)
    if given is not None:
        return given
    path = named or view.text(key, "")
    help = f"memfit.models.{role}=qwen2.5-7b" if role else "+model=qwen2.5-7b"
    if not path:
        raise ConfigError(f"{key} is not set, so the model is unknown. Set it, or add {help}.")
    try:
        return context.resolve_model(path)
    except ModelNotFound as error:
        raise ModelNotFound(f"{key}: {error} Here: {help}") if role else error from None

"""What each of verl's entries is asked first: on which GPUs, and for which model."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import ConfigError, ModelNotFound, NotModelled
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context


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

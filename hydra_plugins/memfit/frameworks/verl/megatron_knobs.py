"""What the planner may set on verl's Megatron backend, beside the knobs that it shares with FSDP; cheapest in speed first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hydra_plugins.memfit.frameworks.verl import batches
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import (
    CRITIC_MEGATRON,
    MEGATRON,
    REF_MEGATRON,
    TRANSFORMER,
    can_be,
)
from hydra_plugins.memfit.frameworks.verl.megatron_read import NO_LEGACY_CHECKPOINTING
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.planning.problem import Knob

OPTIMIZER_OVERRIDE = f"{ACTOR}.optim.override_optimizer_config"
HOST_OPTIMIZER: Mapping[str, object] = {
    f"{OPTIMIZER_OVERRIDE}.optimizer_offload_fraction": 1.0,
    f"{OPTIMIZER_OVERRIDE}.overlap_cpu_optimizer_d2h_h2d": True,
    f"{OPTIMIZER_OVERRIDE}.use_precision_aware_optimizer": True,
}
"""What goes with ``optimizer_cpu_offload``: all of it, and what Megatron's hybrid optimizer asks for."""
_GRANULARITY = "recompute_granularity"
_FULL: Mapping[str, object] = {"recompute_method": "uniform", "recompute_num_layers": 1}
_OLD_FULL: Mapping[str, object] = {
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 1,
}


def megatron_knobs(view: View, launch: Launch) -> Iterator[Knob]:
    """Yield the knobs of offload, recomputation, fused log-probabilities, parallel sizes and the optimizer on the host."""
    yield from _offloads(view, launch)
    yield from _recompute(view, launch)
    if view.has(f"{MODEL}.use_fused_kernels") and parse(launch.version) >= (0, 6) and batches.packed(view, MODEL):
        yield from _on(view, f"{MODEL}.use_fused_kernels", 52, "log-probabilities without the matrix of all logits")
    why = "every layer is spread over more GPUs, which talk to each other in each of them"
    yield from _parallel(view, launch, "tensor_model_parallel_size", 54, why)
    yield from _parallel(
        view, launch, "pipeline_model_parallel_size", 58, "fewer layers on each GPU; GPUs wait for each other"
    )
    if view.section(OPTIMIZER_OVERRIDE):
        why = "the optimizer's states live on the host, and the optimizer step runs there"
        yield from _on(view, f"{OPTIMIZER_OVERRIDE}.optimizer_cpu_offload", 60, why, HOST_OPTIMIZER)


def _waits(view: View, key: str, cost: int, why: str) -> Iterator[Knob]:
    """An offload: it saves memory when it is on, and is faster off."""
    on = view.flag(key, False)
    fast = (False,) if on else ()
    yield Knob(key=key, requested=view.requested(key), candidates=(True,), cost=cost, why=why, fast=fast)


def _on(view: View, key: str, cost: int, why: str, companions: Mapping[str, object] | None = None) -> Iterator[Knob]:
    """A flag that saves memory when it is on; memfit does not switch it off."""
    if view.flag(key, False):
        return
    follow = dict(companions or {})
    yield Knob(
        key=key,
        requested=view.requested(key),
        candidates=(True,),
        cost=cost,
        why=why,
        companions=(lambda value: follow if value else {}) if follow else None,
    )


def _offloads(view: View, launch: Launch) -> Iterator[Knob]:
    if batches.uses_reference(view) and view.section(REF_MEGATRON):
        why = "the reference's parameters wait in host memory while others run"
        yield from _waits(view, f"{REF_MEGATRON}.param_offload", 33, why)
    sections = [(MEGATRON, "the actor's"), *([(CRITIC_MEGATRON, "the critic's")] if launch.critic_model else [])]
    for section, whose in sections:
        why = f"{whose} optimizer states wait in host memory while others run"
        yield from _waits(view, f"{section}.optimizer_offload", 34, why)
        why = f"{whose} parameters wait in host memory while others run, and its gradient buffers are given back"
        yield from _waits(view, f"{section}.param_offload", 36, why)


def _recompute(view: View, launch: Launch) -> Iterator[Knob]:
    """Full recomputation, layer by layer, of actor and critic together: in some releases the critic's keys are the actor's."""
    why = "one more forward pass instead of keeping every layer's activations"
    critic = launch.critic_model is not None
    if parse(launch.version) < NO_LEGACY_CHECKPOINTING:
        models = [MODEL, *(["critic.model"] if critic else [])]
        full = {f"{m}.gradient_checkpointing_kwargs.{name}": value for m in models for name, value in _OLD_FULL.items()}
        full |= {f"{m}.enable_gradient_checkpointing": True for m in models}
        yield from _full(view, f"{MODEL}.gradient_checkpointing_kwargs.activations_checkpoint_granularity", full, why)
        return
    sections = [f"{s}.{TRANSFORMER}" for s in (MEGATRON, *([CRITIC_MEGATRON] if critic else []))]
    full = {
        f"{section}.{name}": value for section in sections for name, value in {_GRANULARITY: "full", **_FULL}.items()
    }
    yield from _full(view, f"{MEGATRON}.{TRANSFORMER}.{_GRANULARITY}", full, why)


def _full(view: View, key: str, full: Mapping[str, object], why: str) -> Iterator[Knob]:
    if all(view.raw(name) == value for name, value in full.items()):
        return
    follow = {name: value for name, value in full.items() if name != key}
    yield Knob(
        key=key,
        requested=view.requested(key),
        candidates=("full",),
        cost=44,
        why=why,
        companions=lambda value: follow if value == "full" else {},
    )


def _parallel(view: View, launch: Launch, name: str, cost: int, why: str) -> Iterator[Knob]:
    key, now = f"{MEGATRON}.{name}", view.integer(f"{MEGATRON}.{name}", 1)
    if view.integer(f"{MEGATRON}.virtual_pipeline_model_parallel_size", 1) > 1:
        return
    limit = launch.gpus_per_node if name.startswith("tensor") else launch.world_size
    sizes = tuple(s for s in (2, 4, 8, 16) if now < s <= limit and can_be(view, launch, **{name: s}))
    others = [f"{section}.{name}" for section in (REF_MEGATRON, CRITIC_MEGATRON) if view.has(f"{section}.{name}")]
    same = [other for other in others if view.raw(other) == now]
    if sizes:
        yield Knob(
            key=key,
            requested=view.requested(key),
            candidates=sizes,
            cost=cost,
            why=why,
            companions=lambda value: dict.fromkeys(same, value) if value != now else {},
            companions_required=False,
        )

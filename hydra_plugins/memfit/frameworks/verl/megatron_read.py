"""verl's Megatron keys -> the roles of one pipeline stage. No formula lives here."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.verl import batches
from hydra_plugins.memfit.frameworks.verl.batches import batch
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import (
    CRITIC_MEGATRON,
    MEGATRON,
    REF_MEGATRON,
    TRANSFORMER,
    layout,
    refuse_uneven_chunks,
    refuse_unmodelled,
    split,
)
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.megatron import Optimizer, Stage, stages, worst_stages
from hydra_plugins.memfit.memory.megatron_layers import RECOMPUTABLE, Recompute
from hydra_plugins.memfit.memory.megatron_pass import VocabularyHead
from hydra_plugins.memfit.model.spec import value_model
from hydra_plugins.memfit.planning.megatron import MegatronRole

_ELEMENT = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp8": 1}
NO_LEGACY_CHECKPOINTING = (0, 5)
"""First release in which recomputation is set by override_transformer_config and not by model.enable_gradient_checkpointing."""


def pipeline(view: View, launch: Launch) -> tuple[Stage, ...]:
    """Return the stages of which one is the worst in each phase; raises `ConfigError` and `NotModelled`."""
    refuse_unmodelled(view)
    if launch.critic_model is not None and view.text("critic.strategy", "megatron") != "megatron":
        raise NotModelled(
            f"critic.strategy={view.raw('critic.strategy')} beside {ACTOR}.strategy=megatron is not modelled: set "
            "critic.strategy=megatron, or go on unplanned with memfit.strict=false."
        )
    found = layout(view, launch)
    told = split(view)
    cut = stages(launch.actor_model, found, told)
    refuse_uneven_chunks(found, told, tuple(stage.layers for stage in cut))
    return worst_stages(cut)


def actor(view: View, launch: Launch, stage: Stage) -> MegatronRole:
    """Return the policy."""
    update, forward = batch(view, launch, batches.UPDATE_ACTOR), batch(view, launch, batches.OLD_LOG_PROB)
    with_entropy = view.number(f"{ACTOR}.entropy_coeff", 0.0, low=-1e9, high=1e9) != 0
    with_entropy = with_entropy or view.flag(f"{ACTOR}.calculate_entropy", False)
    return MegatronRole(
        model=launch.actor_model,
        layout=layout(view, launch),
        stage=stage,
        optimizer=optimizer(view, f"{ACTOR}.optim", MEGATRON),
        param_offload=view.flag(f"{MEGATRON}.param_offload", False),
        optimizer_offload=view.flag(f"{MEGATRON}.optimizer_offload", False),
        recompute=recompute(view, launch, MEGATRON, MODEL),
        forward_head=_head(view, launch, entropy=True),
        update_head=_head(view, launch, entropy=with_entropy),
        forward_tokens=forward.tokens(),
        update_tokens=update.tokens(),
        micro_batches=update.count(),
        gradients_while_sending=parse(launch.version) < (0, 6),
    )


def reference(view: View, launch: Launch, stage: Stage) -> MegatronRole:
    """Return the reference: bf16 parameters alone, on the GPU unless they are offloaded."""
    return MegatronRole(
        model=launch.actor_model,
        layout=layout(view, launch),
        stage=stage,
        trained=False,
        param_offload=view.flag(f"{REF_MEGATRON}.param_offload", False),
        forward_head=_head(view, launch, entropy=False),
        forward_tokens=batch(view, launch, batches.REF_LOG_PROB).tokens(),
    )


def critic(view: View, launch: Launch, stage: Stage) -> MegatronRole:
    """Return the critic, a value head in place of the vocabulary's."""
    assert launch.critic_model is not None
    update, forward = batch(view, launch, batches.UPDATE_CRITIC), batch(view, launch, batches.VALUES)
    head = VocabularyHead(vocabulary=False)
    return MegatronRole(
        model=value_model(launch.critic_model),
        layout=layout(view, launch),
        stage=stage,
        vocabulary_head=False,
        optimizer=optimizer(view, "critic.optim", CRITIC_MEGATRON),
        param_offload=view.flag(f"{CRITIC_MEGATRON}.param_offload", False),
        optimizer_offload=view.flag(f"{CRITIC_MEGATRON}.optimizer_offload", False),
        recompute=recompute(view, launch, CRITIC_MEGATRON, "critic.model"),
        forward_head=head,
        update_head=head,
        forward_tokens=forward.tokens(),
        update_tokens=update.tokens(),
        micro_batches=update.count(),
    )


def optimizer(view: View, section: str, megatron: str) -> Optimizer:
    """Return what Megatron's Adam stores; raises `ConfigError` for a type or a share that is none."""
    override = f"{section}.override_optimizer_config"
    precise = view.flag(f"{section}.use_precision_aware_optimizer", False)
    moments = (
        sum(_element(view, f"{section}.{name}") for name in ("exp_avg_dtype", "exp_avg_sq_dtype")) if precise else 8
    )
    gradients = _element(view, f"{section}.main_grads_dtype") if precise else 4
    reduced = view.flag(f"{megatron}.override_ddp_config.grad_reduce_in_fp32", gradients == 4)
    on_host = view.flag(f"{override}.optimizer_cpu_offload", False)
    fraction = view.number(f"{override}.optimizer_offload_fraction", 0.0, low=0.0, high=1.0)
    return Optimizer(
        moment_bytes=moments, gradient_bytes=4 if reduced else 2, host_fraction=fraction if on_host else 0.0
    )


def _element(view: View, key: str) -> int:
    return _ELEMENT[view.choice(key, "fp32", _ELEMENT)]


def recompute(view: View, launch: Launch, megatron: str, model: str) -> Recompute:
    """Return the recomputation that the release really does; from 0.5 on enable_gradient_checkpointing has no effect on it."""
    section, names = f"{megatron}.{TRANSFORMER}", ("recompute_granularity", "recompute_method", "recompute_num_layers")
    keys = [f"{section}.{name}" for name in names]
    if parse(launch.version) < NO_LEGACY_CHECKPOINTING and view.flag(f"{model}.enable_gradient_checkpointing", False):
        old = f"{model}.gradient_checkpointing_kwargs.activations_checkpoint"
        keys = [f"{old}_granularity", f"{old}_method", f"{old}_num_layers"]
    return Recompute(
        granularity=view.choice(keys[0], "none", ("full", "selective", "none")),
        method=view.choice(keys[1], "uniform", ("uniform", "block")),
        layers=view.integer(keys[2], 1),
        modules=_modules(view, f"{section}.recompute_modules"),
    )


def _modules(view: View, key: str) -> frozenset[str]:
    named = view.raw(key)
    modules = frozenset(map(str, named)) if isinstance(named, (list, tuple)) else frozenset({"core_attn"})
    unknown = sorted(modules - set(RECOMPUTABLE))
    if unknown:
        known = ", ".join(RECOMPUTABLE)
        raise ConfigError(
            f"{key} names {', '.join(unknown)}; Megatron recomputes {known}. Write e.g. {key}=[core_attn]."
        )
    return modules


def _head(view: View, launch: Launch, *, entropy: bool) -> VocabularyHead:
    fused = view.flag(f"{MODEL}.use_fused_kernels", False) and batches.packed(view, MODEL)
    chunked = view.flag(f"{MEGATRON}.entropy_from_logits_with_chunking", False)
    scales = parse(launch.version) >= (0, 6)
    return VocabularyHead(
        entropy="none" if not entropy else "chunks" if chunked else "whole",
        chunk_tokens=view.integer(f"{MEGATRON}.entropy_from_logits_chunk_size", 2048),
        copied=scales,
        scaled=scales,
        fused=fused,
    )

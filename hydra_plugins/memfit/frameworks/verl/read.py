"""verl's config -> `ColocatedRun`: which keys lead to which fact. No formula lives here."""

from __future__ import annotations

from dataclasses import replace

from hydra_plugins.memfit.base.errors import NotModelled
from hydra_plugins.memfit.frameworks.verl import batches, images, megatron_read
from hydra_plugins.memfit.frameworks.verl.batches import batch, uses_reference
from hydra_plugins.memfit.frameworks.verl.engines import rollout_engine, rollout_name, serves_adapters
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, FRACTION, LORA_MERGE, MODEL, REF, ROLLOUT, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import is_megatron
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.megatron import Stage
from hydra_plugins.memfit.memory.states import lora_parameters
from hydra_plugins.memfit.model.spec import ModelSpec, value_model
from hydra_plugins.memfit.planning.colocated import ColocatedRun, Role
from hydra_plugins.memfit.planning.roles import Handover, Occupant

_MASTER_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
FSDP_STRATEGIES = ("fsdp", "fsdp2")


def read(view: View, launch: Launch) -> tuple[ColocatedRun, ...]:
    """Return the run that the config describes, once for each kind of rank; raises `ConfigError` and `NotModelled`."""
    if is_megatron(view):
        return tuple(_stage(view, launch, stage) for stage in megatron_read.pipeline(view, launch))
    strategy = _strategy(view, f"{ACTOR}.strategy")
    lora_rank = view.integer(f"{MODEL}.lora_rank", 0, minimum=0)
    actor = _actor(view, launch, strategy, lora_rank)
    run = _run(
        view,
        launch,
        lora_rank=lora_rank,
        actor=actor,
        reference=_reference(view, launch, actor, strategy, lora_rank) if uses_reference(view) else None,
        critic=_critic(view, launch) if launch.critic_model is not None else None,
    )
    return (run,)


def _stage(view: View, launch: Launch, stage: Stage) -> ColocatedRun:
    """The run of one pipeline stage of Megatron."""
    return _run(
        view,
        launch,
        lora_rank=0,
        actor=megatron_read.actor(view, launch, stage),
        reference=megatron_read.reference(view, launch, stage) if uses_reference(view) else None,
        critic=megatron_read.critic(view, launch, stage) if launch.critic_model is not None else None,
    )


def _run(
    view: View, launch: Launch, *, lora_rank: int, actor: Occupant, reference: Occupant | None, critic: Occupant | None
) -> ColocatedRun:
    b = launch.behaviour
    return ColocatedRun(
        capacity_bytes=launch.capacity_bytes,
        budget_bytes=launch.budget_bytes,
        held_bytes=launch.held_bytes,
        host_budget_bytes=launch.host_budget_bytes,
        world_size=launch.world_size,
        gpus_per_node=launch.gpus_per_node,
        actor=actor,
        reference=reference,
        reference_is_actor=lora_rank > 0,
        critic=critic,
        engine=_engine(view, launch) if launch.placement.hybrid else None,
        engines_apart=launch.placement.apart,
        old_log_prob=not view.flag("algorithm.rollout_correction.bypass_mode", False),
        handover=Handover(
            bucket_bytes=bucket_bytes(view, launch),
            merged=lora_rank > 0 and view.flag(LORA_MERGE, False),
            layered=view.flag(f"{ROLLOUT}.layered_summon", False),
        ),
        sync_over_reserved=b.sync_over_reserved,
        expandable_segments=launch.margin.expandable_segments,
        tied_load=launch.actor_model.tie_word_embeddings,
        fraction_key=FRACTION,
    )


def bucket_bytes(view: View, launch: Launch) -> int:
    """Return the buffer of the weight transfer."""
    b = launch.behaviour
    return view.integer(b.bucket_key, b.bucket_default) << 20 if b.bucket_key else 0


def sent_bytes(view: View, launch: Launch) -> int:
    """Return the bytes of one element of a weight on its way to the engine."""
    is_fsdp = view.text(f"{ACTOR}.strategy", "fsdp") in FSDP_STRATEGIES
    return master_bytes(view, f"{ACTOR}.fsdp_config") if is_fsdp and not launch.behaviour.travels_in_bf16 else 2


def smallest_bucket_bytes(launch: Launch) -> int:
    """Return the bucket below which verl would refuse to send the largest tensor to engines on other GPUs."""
    is_bound = launch.placement.apart and launch.behaviour.whole_tensors
    return 2 * launch.actor_model.embedding_parameters if is_bound else 0


def _strategy(view: View, key: str) -> str:
    strategy = view.text(key, "fsdp")
    if strategy not in FSDP_STRATEGIES:
        raise NotModelled(
            f"{key}={strategy}: memfit models verl's FSDP engines (fsdp, fsdp2) and megatron. Launch without the hardware "
            f"group, set {key}=fsdp, or go on unplanned with memfit.strict=false."
        )
    return strategy


def sharding(
    view: View,
    launch: Launch,
    model: ModelSpec,
    *,
    section: str,
    strategy: str,
    trainable: bool = True,
    vocabulary_head: bool = True,
) -> Sharding:
    """Return how a model is wrapped and sharded, as its ``section`` of FSDP settings says."""
    asked = view.integer(f"{section}.fsdp_size", -1, minimum=-1)
    world = launch.world_size
    sharding = Sharding.of(
        model,
        version=2 if strategy == "fsdp2" else 1,
        ranks=world if asked <= 0 or asked >= world else asked,
        trainable=trainable,
        vocabulary_head=vocabulary_head,
    )
    return replace(
        sharding,
        reshard_after_forward=view.flag(f"{section}.reshard_after_forward", True),
        forward_prefetch=view.flag(f"{section}.forward_prefetch", False),
    )


def master_bytes(view: View, section: str) -> int:
    """Return the bytes of a stored parameter under a section of FSDP; raises `ConfigError`."""
    return _MASTER_BYTES[view.choice(f"{section}.model_dtype", "fp32", _MASTER_BYTES)]


def _keeps_root(view: View, launch: Launch, section: str) -> bool:
    return launch.behaviour.keeps_root_after_inference and view.integer(f"{section}.fsdp_size", -1, minimum=-1) <= 1


# -- the policy -----------------------------------------------------------------------------------------------------
def _actor(view: View, launch: Launch, strategy: str, lora_rank: int) -> Role:
    section, model = f"{ACTOR}.fsdp_config", launch.actor_model
    update, forward = batch(view, launch, batches.UPDATE_ACTOR), batch(view, launch, batches.OLD_LOG_PROB)
    offload_policy = strategy == "fsdp2" and view.flag(f"{section}.offload_policy", False)
    sites = (*model.lora_sites, *(model.expert_lora_sites if launch.behaviour.expert_linears else ()))
    wrapped = sharding(view, launch, model, section=section, strategy=strategy, trainable=not lora_rank)
    tower = (
        images.adapted_tower(view, launch) if lora_rank else images.actor_tower(view, launch, version=wrapped.version)
    )
    sites = (*sites, *tower.lora_sites)
    full = model.parameters - tower.frozen_parameters
    trainable = lora_parameters(sites=sites, rank=lora_rank) if lora_rank else full
    packed = view.flag(f"{MODEL}.use_remove_padding", False)
    with_entropy = view.number(f"{ACTOR}.entropy_coeff", 0.0, low=-1e9, high=1e9) != 0
    with_entropy = with_entropy or view.flag(f"{ACTOR}.calculate_entropy", False)
    return Role(
        model=model,
        sharding=wrapped,
        trainable_parameters=trainable,
        master_bytes=master_bytes(view, section),
        param_offload=view.flag(f"{section}.param_offload", False) and not offload_policy,
        optimizer_offload=view.flag(f"{section}.optimizer_offload", False) and not offload_policy,
        cpu_policy=offload_policy,
        checkpointing=view.flag(f"{MODEL}.enable_gradient_checkpointing", True),
        activation_offload=view.flag(f"{MODEL}.enable_activation_offload", False),
        forward_head=_head(view, launch, entropy=True, packed=packed),
        update_head=_head(view, launch, entropy=with_entropy, packed=packed),
        forward_tokens=forward.tokens(),
        update_tokens=update.tokens(),
        sequence_parallel=update.sequence_parallel,
        forward_image_tokens=_image_tokens(view, launch, model, forward),
        update_image_tokens=_image_tokens(view, launch, model, update),
        trains_vision=tower.has_gradients,
        accumulates=update.accumulates(),
        moved_output=update.moves_output,
        unsharded_gradients=view.flag(f"{section}.use_no_sync_for_gradient_accumulation", False),
        keeps_root=_keeps_root(view, launch, section),
    )


def _image_tokens(view: View, launch: Launch, model: ModelSpec, batch: Batch) -> int:
    if model.vision is None:
        return 0
    prompt = view.integer("data.max_prompt_length", 512)
    return batch.image_tokens(prompt=images.per_prompt(launch.settings.lengths, prompt))


def _head(view: View, launch: Launch, *, entropy: bool, packed: bool) -> Head:
    fused = "none"
    if view.flag(f"{MODEL}.use_fused_kernels", False):
        fused = view.text(f"{MODEL}.fused_kernel_options.impl_backend", "torch")
        fused = fused if fused in ("torch", "triton") else "torch"
    section = launch.behaviour.entropy_section
    compiled = view.flag(launch.behaviour.compile_key, True) and packed
    chunked = view.flag(f"{section}.entropy_from_logits_with_chunking", False) and packed
    kind = "none" if not entropy else "compiled" if compiled else "chunked" if chunked else "eager"
    temperature = view.number(f"{ROLLOUT}.temperature", 1.0, low=0.0, high=1e6)
    in_place = launch.behaviour.divides_in_place
    return Head(
        entropy=kind,
        entropy_checkpointing=view.flag(f"{section}.entropy_checkpointing", False),
        chunk_tokens=view.integer(f"{section}.entropy_from_logits_chunk_size", 2048),
        log_prob="flash_ce" if launch.flash_cross_entropy else "torch",
        fused=fused,
        scaled="in_place" if in_place else "no" if temperature == 1.0 else "copy",
        extra_copies=0 if packed else 1,
    )


def _reference(view: View, launch: Launch, actor: Role, strategy: str, lora_rank: int) -> Role:
    section, model = f"{REF}.fsdp_config", launch.actor_model
    packed = view.flag(f"{MODEL}.use_remove_padding", False)
    forward = batch(view, launch, batches.OLD_LOG_PROB if lora_rank else batches.REF_LOG_PROB)
    master = master_bytes(view, section) if launch.behaviour.reference_dtype_key else 2
    return Role(
        model=model,
        sharding=actor.sharding if lora_rank else sharding(view, launch, model, section=section, strategy=strategy),
        trainable_parameters=0,
        master_bytes=actor.master_bytes if lora_rank else master,
        param_offload=True,
        cpu_policy=actor.cpu_policy if lora_rank else True,
        forward_head=_head(view, launch, entropy=False, packed=packed),
        forward_tokens=forward.tokens(),
        sequence_parallel=forward.sequence_parallel,
        forward_image_tokens=_image_tokens(view, launch, model, forward),
        keeps_root=not lora_rank and _keeps_root(view, launch, section),
    )


# -- the critic -----------------------------------------------------------------------------------------------------
def has_critic(view: View) -> bool:
    """Whether the launch trains a critic: asked for, or needed by the advantage estimator."""
    if view.raw("critic.enable") not in (MISSING, None):
        return view.flag("critic.enable", True)
    return view.section("critic") and view.text("algorithm.adv_estimator", "gae") == "gae"


def _critic(view: View, launch: Launch) -> Role:
    model, section = launch.critic_model, launch.behaviour.critic_fsdp
    assert model is not None
    strategy = _strategy(view, "critic.strategy")
    update, forward = batch(view, launch, batches.UPDATE_CRITIC), batch(view, launch, batches.VALUES)
    offload_policy = strategy == "fsdp2" and view.flag(f"{section}.offload_policy", False)
    critic = value_model(model)
    return Role(
        model=critic,
        sharding=sharding(view, launch, critic, section=section, strategy=strategy, vocabulary_head=False),
        trainable_parameters=critic.parameters,
        master_bytes=master_bytes(view, section),
        param_offload=view.flag(f"{section}.param_offload", False) and not offload_policy,
        optimizer_offload=view.flag(f"{section}.optimizer_offload", False) and not offload_policy,
        cpu_policy=offload_policy,
        checkpointing=view.flag("critic.model.enable_gradient_checkpointing", True),
        activation_offload=view.flag("critic.model.enable_activation_offload", False),
        forward_head=Head(vocabulary=False),
        update_head=Head(vocabulary=False),
        forward_tokens=forward.tokens(),
        update_tokens=update.tokens(),
        sequence_parallel=update.sequence_parallel,
        forward_image_tokens=_image_tokens(view, launch, model, forward),
        update_image_tokens=_image_tokens(view, launch, model, update),
        accumulates=update.accumulates(),
        moved_output=update.moves_output,
        unsharded_gradients=view.flag(f"{section}.use_no_sync_for_gradient_accumulation", False),
    )


# -- the rollout engine ---------------------------------------------------------------------------------------------
def _engine(view: View, launch: Launch) -> Engine:
    """The policy's engine on the trainer's GPUs, which sleeps while the trainer works."""
    engine, b = rollout_engine(view, launch), launch.behaviour
    is_sglang, adapters = rollout_name(view) == "sglang", serves_adapters(view)
    return replace(
        engine,
        in_process=b.engine_in_process and view.text(f"{ROLLOUT}.mode", "sync") == "sync",
        keeps_weights=is_sglang and adapters,
        weights_on_host=is_sglang or b.sleep_copies_weights or adapters,
    )

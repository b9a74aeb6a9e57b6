"""verl's keys of its Megatron backend: the layout of the ranks, and what memfit refuses there."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, REF, Launch
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory.megatron import Layout, Split, layer_counts
from hydra_plugins.memfit.model.spec import ModelSpec

MEGATRON = f"{ACTOR}.megatron"
REF_MEGATRON = f"{REF}.megatron"
CRITIC_MEGATRON = "critic.megatron"
TRANSFORMER = "override_transformer_config"
PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Sizes of Megatron's process groups. A process makes its groups once, so all roles have the actor's."""

_UNPLANNED = "Launch without the hardware group, or go on unplanned with memfit.strict=false."


def is_megatron(view: View) -> bool:
    """Whether the actor is trained by Megatron."""
    return view.text(f"{ACTOR}.strategy", "fsdp") == "megatron"


def layout(view: View, launch: Launch) -> Layout:
    """Return how models are spread over the GPUs; raises `ConfigError` for sizes that do not divide them."""
    found = _layout(view, launch.world_size)
    _refuse_indivisible(found, launch)
    _refuse_model(found, launch.actor_model)
    return found


def _size(view: View, name: str, default: int = 1) -> int:
    key = f"{MEGATRON}.{name}"
    return default if view.raw(key) == "None" else view.integer(key, default)


def _layout(view: View, world: int) -> Layout:
    tensor = _size(view, "tensor_model_parallel_size")
    return Layout(
        world=world,
        tensor=tensor,
        pipeline=_size(view, "pipeline_model_parallel_size"),
        virtual=_size(view, "virtual_pipeline_model_parallel_size"),
        context=_size(view, "context_parallel_size"),
        expert=_size(view, "expert_model_parallel_size"),
        expert_tensor=_size(view, "expert_tensor_parallel_size", tensor),
        sequence_parallel=tensor > 1 and view.flag(f"{MEGATRON}.sequence_parallel", True),
        distributed_optimizer=view.flag(f"{MEGATRON}.use_distributed_optimizer", True),
    )


def _refuse_indivisible(found: Layout, launch: Launch) -> None:
    dense = found.tensor * found.pipeline * found.context
    experts = found.expert_tensor * found.expert * found.pipeline
    moe = launch.actor_model.num_experts > 0
    for size, names in ((dense, PARALLEL[:2] + PARALLEL[3:4]), (experts if moe else 1, (*PARALLEL[4:], PARALLEL[1]))):
        if found.world % size:
            raise ConfigError(
                f"{' x '.join(f'{MEGATRON}.{name}' for name in names)} = {size} does not divide the {found.world} GPUs of "
                f"the trainer: Megatron refuses that. Choose sizes whose product divides {found.world}, e.g. "
                f"{MEGATRON}.{names[0]}=1."
            )


def _refuse_model(found: Layout, model: ModelSpec) -> None:
    """Sizes that do not divide heads, MLP or experts: Megatron stops while it builds the model."""
    kv = model.num_attention_heads if model.kv_lora_rank else model.num_key_value_heads
    wrong = [
        (model.num_attention_heads % found.tensor, "tensor_model_parallel_size", f"{model.num_attention_heads} heads"),
        (kv % found.tensor and found.tensor % kv, "tensor_model_parallel_size", f"{kv} key/value heads"),
        (model.num_experts % found.expert, "expert_model_parallel_size", f"{model.num_experts} experts"),
    ]
    for remainder, name, what in wrong:
        if remainder:
            raise ConfigError(
                f"{MEGATRON}.{name} does not divide the {what} of {model.name}: Megatron refuses that. Write "
                f"{MEGATRON}.{name}=1, or another divisor."
            )
    if found.expert > 1 and not model.num_experts:
        raise ConfigError(
            f"{MEGATRON}.expert_model_parallel_size={found.expert}: {model.name} has no experts. Write "
            f"{MEGATRON}.expert_model_parallel_size=1."
        )


def refuse_uneven_chunks(found: Layout, cut: Split, layers: tuple[int, ...]) -> None:
    """Raise `ConfigError` where a stage's places, those of the embedding and the loss among them, do not divide into chunks."""
    places = [*layers]
    places[0] += cut.embedding_counts
    places[-1] += cut.loss_counts
    if any(count % found.virtual for count in places):
        raise ConfigError(
            f"{MEGATRON}.virtual_pipeline_model_parallel_size={found.virtual} does not divide the {max(places)} layers of a "
            f"pipeline stage: Megatron refuses that. Write {MEGATRON}.virtual_pipeline_model_parallel_size=null."
        )


def split(view: View) -> Split:
    """Return how layers are cut into stages."""
    override = f"{MEGATRON}.{TRANSFORMER}"
    if view.raw(f"{override}.pipeline_model_parallel_layout") not in (MISSING, None):
        raise NotModelled(f"{override}.pipeline_model_parallel_layout is not modelled. {_UNPLANNED}")
    return Split(
        first=view.optional_integer(f"{override}.num_layers_in_first_pipeline_stage"),
        last=view.optional_integer(f"{override}.num_layers_in_last_pipeline_stage"),
        embedding_counts=view.flag(f"{override}.account_for_embedding_in_pipeline_split", False),
        loss_counts=view.flag(f"{override}.account_for_loss_in_pipeline_split", False),
    )


def can_be(view: View, launch: Launch, **sizes: int) -> bool:
    """Whether Megatron would accept other parallel sizes (names as in the config)."""
    turned = view.with_values({**view.overrides, **{f"{MEGATRON}.{name}": size for name, size in sizes.items()}})
    try:
        found = layout(turned, launch)
        layer_counts(launch.actor_model.num_hidden_layers, found.pipeline * found.virtual, split(turned))
    except ConfigError:
        return False
    return True


def refuse_unmodelled(view: View) -> None:
    """Raise `NotModelled` for what Megatron can do and memfit does not predict; the message names the key.

    Raises `ConfigError` where the strategy is set in the config of another backend.
    """
    if not view.section(MEGATRON):
        raise ConfigError(
            f"{ACTOR}.strategy=megatron, but the config has no {MEGATRON}: it is that of another backend. Start from verl's "
            "own, with --config-name=ppo_megatron_trainer, or model_engine=megatron from 0.8 on."
        )
    sections = [MEGATRON, *([CRITIC_MEGATRON] if view.section(CRITIC_MEGATRON) else [])]
    flags = {
        "use_megatron_fsdp": "Megatron's own FSDP",
        "dynamic_context_parallel": "dynamic context parallelism",
        f"{TRANSFORMER}.cpu_offloading": "offloading activations to the host",
        f"{TRANSFORMER}.fine_grained_activation_offloading": "offloading activations to the host",
    }
    asked = [(f"{s}.{name}", what) for s in sections for name, what in flags.items() if view.raw(f"{s}.{name}") is True]
    asked += (
        [(f"{MODEL}.mtp.enable_train", "multi-token prediction")]
        if view.raw(f"{MODEL}.mtp.enable_train") is True
        else []
    )
    for section in sections:
        if view.raw(f"{section}.{TRANSFORMER}.fp8") not in (MISSING, None, False):
            asked.append((f"{section}.{TRANSFORMER}.fp8", "fp8 training"))
        if view.text(f"{section}.dtype", "bfloat16") not in ("bfloat16", "bf16", "float16", "fp16"):
            asked.append((f"{section}.dtype", "training in another type than bf16 and fp16"))
    if view.integer(f"{MODEL}.lora.rank", 0, minimum=0):
        asked.append((f"{MODEL}.lora.rank", "LoRA on Megatron"))
    if view.text(f"{ACTOR}.optim.optimizer", "adam").lower() not in ("adam", "adamw"):
        asked.append((f"{ACTOR}.optim.optimizer", "another optimizer than Adam on Megatron"))
    for key, what in asked:
        raise NotModelled(f"{key}={view.raw(key)}: {what} is not modelled yet. {_UNPLANNED}")

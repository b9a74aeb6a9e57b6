"""What verl itself would refuse, and what would kill a launch for another reason than its size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.linear_attention import kernel_note
from hydra_plugins.memfit.frameworks.verl import batches, engines, images, others, placement
from hydra_plugins.memfit.frameworks.verl import read as r
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, REF, ROLLOUT, TENSOR_PARALLEL, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_checks import indivisible, layout_notes
from hydra_plugins.memfit.frameworks.verl.megatron_keys import MEGATRON, is_megatron
from hydra_plugins.memfit.frameworks.verl.surroundings import shares_heads
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import MISSING, View, unpinned
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.allocator import ALLOCATOR_VARIABLES, says_expandable
from hydra_plugins.memfit.memory.breakdown import Shortfall
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Change

SECTIONS = (
    "actor_rollout_ref",
    *(ACTOR, f"{ACTOR}.fsdp_config", MEGATRON, f"{MEGATRON}.override_transformer_config"),
    *(REF, f"{REF}.fsdp_config", f"{REF}.megatron"),
    *(MODEL, ROLLOUT, "data", "trainer", "algorithm"),
    *("critic", "critic.model", "critic.fsdp", "critic.megatron"),
)
PLACEHOLDER = "~/models/deepseek-llm-7b-chat"
"""actor_rollout_ref.model.path and critic.model.path in verl's own yaml, every release."""
DEFAULT_MINI_BATCH = 256
"""actor.ppo_mini_batch_size in verl's own yaml, every release."""
EXPANDABLE_REFUSED = (0, 18)
"""Last vLLM that was read to assert against expandable segments beside its memory pool."""
EXPANDABLE_TOLERATED = (0, 24)
"""First vLLM that was read to switch them off around the pool itself."""


def refuse_values_for_sections(view: View) -> None:
    """Raise `ConfigError` where a whole section was replaced by one value: everything in it would read as unset."""
    for key in SECTIONS:
        value = view.raw(key)
        if value is not MISSING and value is not None and not view.section(key):
            raise ConfigError(
                f"{key}={value!r} replaces a whole section of verl's config. Set a key inside it instead."
            )


def fixes(view: View, launch: Launch, *, pinned: Collection[str], explicit: Collection[str]) -> tuple[Change, ...]:
    """Return the changes without which verl would refuse the launch, or fail in its first step, at any size.

    Raises `ConfigError` where such a value is pinned.
    """
    changes = [
        *_tensor_parallel(view, launch),
        *_mini_batch(view, explicit),
        *_budgets(view, launch),
        *_global_micro_batches(view, launch),
        *_in_process_engine(view, launch),
        *_other_engines(view, launch),
        *_unread_critic_batch(view, launch),
    ]
    return unpinned(changes, pinned)


def _tensor_parallel(view: View, launch: Launch) -> list[Change]:
    size, worlds = view.integer(TENSOR_PARALLEL, 2), launch.engine_worlds
    if view.integer(f"{ROLLOUT}.expert_parallel_size", 1) > 1 or engines.engine_splits(view, launch, size):
        return []
    fitting = max((s for s in range(1, min(size, *worlds) + 1) if engines.engine_splits(view, launch, s)), default=1)
    heads = launch.actor_model.num_attention_heads
    world = next((world for world in worlds if world % size), 0)
    why = f"verl needs a rollout tensor parallel size that divides the {world} GPU{'s' * (world > 1)}"
    if world == 0:
        why = f"the engine needs a tensor parallel size that divides the model's {heads} attention heads"
    return [Change(key=TENSOR_PARALLEL, old=view.requested(TENSOR_PARALLEL), new=fitting, kind="neutral", why=why)]


def _other_engines(view: View, launch: Launch) -> list[Change]:
    """Sizes of the engines of other models that do not divide their pools."""
    changes = []
    for other in others.others(view, launch):
        key, size = other.size_key, view.integer(other.size_key, 2)
        fitting = max((s for s in range(1, size + 1) if others.fits_pool(view, other, s)), default=1)
        if fitting != size:
            why = f"the engines of {other.model.name} must divide their {other.world_size} GPUs and its attention heads"
            changes.append(Change(key=key, old=view.requested(key), new=fitting, kind="neutral", why=why))
    return changes


def _in_process_engine(view: View, launch: Launch) -> list[Change]:
    """What verl up to 0.6 asserts before it starts vLLM in the trainer's process."""
    in_process = launch.behaviour.engine_in_process and view.text(f"{ROLLOUT}.mode", "sync") == "sync"
    if not in_process or engines.rollout_name(view) != "vllm":
        return []
    changes = []
    key, longest = f"{ROLLOUT}.max_num_batched_tokens", engines.max_model_len(view, launch)
    if view.flag(f"{ROLLOUT}.enable_chunked_prefill", True) and view.integer(key, 8192) < longest:
        why = f"verl {launch.version} refuses chunks of a prefill below the longest sequence, {longest} tokens"
        changes.append(Change(key=key, old=view.requested(key), new=longest, kind="neutral", why=why))
    key = f"{ROLLOUT}.enforce_eager"
    graphs_refused = parse(launch.version) < (0, 5) and view.flag(f"{ROLLOUT}.free_cache_engine", True)
    if graphs_refused and not view.flag(key, True):
        why = f"verl {launch.version} refuses CUDA graphs in an engine that frees its cache"
        changes.append(Change(key=key, old=False, new=True, kind="neutral", why=why))
    return changes


def _mini_batch(view: View, explicit: Collection[str]) -> list[Change]:
    """verl refuses a mini-batch above the batch; its own default of 256 is lowered, a value that the user wrote is not."""
    key, batch = f"{ACTOR}.ppo_mini_batch_size", batches.prompts_per_step(view)
    size = view.integer(key, 256)
    if size <= batch or view.flag(f"{ACTOR}.use_dynamic_bsz", False):
        return []
    if key in explicit or size != DEFAULT_MINI_BATCH:
        raise ConfigError(
            f"{key}={size} is above data.train_batch_size={batch}: verl refuses that. Write {key}={batch} or less."
        )
    why = f"verl refuses its default of {size} with a batch of {batch}: one optimizer step a batch"
    return [Change(key=key, old=size, new=batch, kind="neutral", why=why)]


def _budgets(view: View, launch: Launch) -> list[Change]:
    changes = []
    for name in batches.active(view, launch):
        key, batch = batches.pass_keys(name, launch).budget_key, batches.batch(view, launch, name)
        need = -(-batch.longest // batch.sequence_parallel)
        if batch.dynamic and batch.budget < need:
            why = f"one sequence of {batch.longest} tokens must fit into a micro-batch"
            changes.append(Change(key=key, old=view.requested(key), new=need, kind="neutral", why=why))
    return list(dict.fromkeys(changes))


def _global_micro_batches(view: View, launch: Launch) -> list[Change]:
    """The engine classes insist on the per-GPU keys; the deprecated global ones pass verl's validation and die later."""
    if launch.behaviour.legacy_workers:
        return []
    changes = []
    for name in (batches.UPDATE_ACTOR, batches.OLD_LOG_PROB, batches.REF_LOG_PROB):
        key, batch = batches.pass_keys(name, launch).micro_key, batches.batch(view, launch, name)
        whole = view.optional_integer(key)
        if batch.dynamic or whole is None or view.optional_integer(f"{key}_per_gpu") is not None:
            continue
        why = f"verl's workers read {key}_per_gpu alone; {whole} over all GPUs is the same"
        changes.append(Change(key=f"{key}_per_gpu", old=None, new=batch.micro_batch, kind="neutral", why=why))
        why = f"verl refuses both keys at once, see {key}_per_gpu"
        changes.append(Change(key=key, old=whole, new=None, kind="neutral", why=why))
    return changes


def blockers(view: View, launch: Launch, context: Context) -> tuple[str, ...]:
    """Return why the launch would die whatever its size; each with the fix."""
    found = []
    message = _expandable_segments(view, launch, context)
    if message and parse(launch.engine_version) <= (*EXPANDABLE_REFUSED, 10**6):
        found.append(message)
    strategies = batches.sequence_parallel(view)
    if strategies > 1 and not view.flag(f"{MODEL}.use_remove_padding", False):
        found.append(
            f"{ACTOR}.ulysses_sequence_parallel_size={strategies} needs {MODEL}.use_remove_padding=true: verl refuses "
            "sequence parallelism on padded batches."
        )
    found += [*_indivisible(view, launch), *placement.blockers(view, launch.placement, launch.version)]
    return (*found, *_pipelined(view, launch), *_small_bucket(view, launch))


def _pipelined(view: View, launch: Launch) -> list[str]:
    """Engines in pipeline stages: verl's ``RolloutConfig`` raises (workers/config/rollout.py, 0.6 to 0.9)."""
    sections = (ROLLOUT, *(other.section for other in others.others(view, launch)))
    keys = [f"{section}.pipeline_model_parallel_size" for section in sections if parse(launch.version) >= (0, 6)]
    return [
        f"{key}={view.raw(key)}: verl {launch.version} has no engine in pipeline stages and refuses to start. Write {key}=1; "
        f"{key.replace('pipeline_model', 'tensor_model')} spreads an engine over GPUs."
        for key in keys
        if view.integer(key, 1) > 1
    ]


def _small_bucket(view: View, launch: Launch) -> list[str]:
    """0.7 sends a tensor to other GPUs in one bucket or not at all."""
    needed, key = r.smallest_bucket_bytes(launch), launch.behaviour.bucket_key
    if r.bucket_bytes(view, launch) >= needed:
        return []
    return [
        f"{key}={r.bucket_bytes(view, launch) >> 20} is smaller than the embedding of {launch.actor_model.name}: verl "
        f"{launch.version} asserts that a tensor fits. Write {key}={-(-needed >> 20)}."
    ]


def _meshes(view: View, launch: Launch) -> list[str]:
    """Sizes of Ulysses and FSDP groups that do not divide the GPUs, or heads: device mesh and model patch of verl raise.

    verl ``workers/fsdp_workers.py``, ``workers/engine/fsdp/utils.py``, ``models/transformers/monkey_patch.py``, every release.
    """
    world, found = launch.world_size, []
    ulysses = {f"{ACTOR}.ulysses_sequence_parallel_size": launch.actor_model}
    if launch.critic_model:
        ulysses[batches.critic_ulysses_key(launch)] = launch.critic_model
    for key, model in ulysses.items():
        size = view.integer(key, 1)
        if world % size:
            found.append(
                f"{key}={size} does not divide the {world} GPUs of the trainer: verl cannot start. Write {key}=1."
            )
        elif not shares_heads(model, size):
            found.append(
                f"{key}={size}: verl shares out the {model.num_attention_heads} attention heads of {model.name} "
                f"({model.num_key_value_heads} for keys and values), and refuses where they do not divide. Write {key}=1."
            )
    for key in (f"{ACTOR}.fsdp_config.fsdp_size", f"{launch.behaviour.critic_fsdp}.fsdp_size"):
        size = view.integer(key, -1, minimum=-1)
        if 0 < size < world and world % size and (launch.critic_model or key.startswith(ACTOR)):
            found.append(
                f"{key}={size} does not divide the {world} GPUs of the trainer: verl cannot start. Write {key}=-1."
            )
    return found


def _indivisible(view: View, launch: Launch) -> list[str]:
    """Batches that verl cannot share out evenly: it stops at start, or in the first update."""
    if is_megatron(view):
        return indivisible(view, launch)
    found, n = _meshes(view, launch), view.integer(f"{ROLLOUT}.n", 1)
    prompts, mini = batches.prompts_per_step(view), view.integer(f"{ACTOR}.ppo_mini_batch_size", 256)
    world, ranks = launch.world_size, max(1, launch.world_size // batches.sequence_parallel(view))
    static = not view.flag(f"{ACTOR}.use_dynamic_bsz", False) or parse(launch.version) < (0, 5)
    if static and prompts * n % world:
        found.append(
            f"data.train_batch_size={prompts} x {ROLLOUT}.n={n} is not a multiple of {world} GPUs: verl refuses that. "
            f"Write e.g. data.train_batch_size={-(-prompts // world) * world}."
        )
    refused = mini * n < ranks if launch.behaviour.legacy_workers else mini * n % ranks
    if refused:
        found.append(
            f"{ACTOR}.ppo_mini_batch_size={mini} x {ROLLOUT}.n={n} cannot be shared out among {ranks} data-parallel "
            f"ranks: verl stops in the first update. Write e.g. {ACTOR}.ppo_mini_batch_size={-(-mini // ranks) * ranks}."
        )
    return found


def _expandable_segments(view: View, launch: Launch, context: Context) -> str:
    """The allocator setting that torch's own OOM message recommends, and that breaks a vLLM that sleeps."""
    if engines.rollout_name(view) != "vllm" or not view.flag(f"{ROLLOUT}.free_cache_engine", True):
        return ""
    for name in ALLOCATOR_VARIABLES:
        for where, value in (("the environment", context.environ.get(name)), ("ray_kwargs", _ray_env(view, name))):
            if says_expandable(value):
                return (
                    f"{name}={value} (from {where}): vLLM {launch.engine_version} stops at start with "
                    '"Expandable segments are not compatible with memory pool". '
                    f"Unset it (`unset {name}`); verl switches expandable segments on in the trainer by itself "
                    "from 0.6 on. memfit.strict=false goes on all the same."
                )
    return ""


def _ray_env(view: View, name: str) -> Any:
    env = view.raw("ray_kwargs.ray_init.runtime_env.env_vars")
    return env.get(name) if isinstance(env, Mapping) else None


def _assumed(view: View, launch: Launch) -> list[str]:
    """Return what the launch leaves open and memfit takes for granted."""
    lines = []
    if view.raw(f"{ROLLOUT}.name") in (MISSING, None, "???"):
        lines.append(
            f"{ROLLOUT}.name is not set, and verl {launch.version} stops without it: vllm is counted. "
            f"Set {ROLLOUT}.name=vllm or sglang."
        )
    if view.raw(f"{MODEL}.path") == PLACEHOLDER:
        lines.append(f"{MODEL}.path is verl's own placeholder, {PLACEHOLDER}: set the checkpoint that you train.")
    return lines + _linear_attention(view, launch)


def _linear_attention(view: View, launch: Launch) -> list[str]:
    """What is taken for granted about layers with linear attention, and where verl does not divide them."""
    name = launch.actor_model.name
    if not launch.actor_model.num_linear_attention_layers:
        return []
    if is_megatron(view):
        return [
            f"{name} has layers with linear attention, which are not modelled in Megatron: they are counted as attention. Keep "
            "more room with memfit.margin=0.15."
        ]
    found, size = kernel_note(launch.actor_model), batches.sequence_parallel(view)
    if size > 1:
        found.append(
            f"{ACTOR}.ulysses_sequence_parallel_size={size}: the prediction divides sequences of {name}; a public run had "
            "whole ones on every rank (verl issue 7476)."
        )
    return found


def notes(view: View, launch: Launch, context: Context) -> tuple[str, ...]:
    """Return what a user should know about the reading of the config."""
    lines = [*context.hardware.warnings, *(layout_notes(view, launch) if is_megatron(view) else [])]
    lines += _assumed(view, launch)
    message = _expandable_segments(view, launch, context)
    if message and EXPANDABLE_REFUSED < parse(launch.engine_version)[:2] < EXPANDABLE_TOLERATED:
        lines.append(message.replace("stops at start with", "may stop at start with (not checked for this release)"))
    if launch.behaviour.legacy_workers and launch.settings.goal == "fast":
        lines.append(
            f"verl {launch.version} weights a token by the micro-batch that it lands in (loss_agg_mode=token-mean): "
            "other micro-batches change the gradient slightly, as another number of GPUs does."
        )
    lines += images.notes(view, launch)
    if not has_flash_attention(context.hardware):
        lines.append(
            f"{context.hardware.product} has neither bf16 nor flash-attn, which verl uses unless told otherwise: the "
            "prediction is for its fallbacks in size, and says nothing about whether they run."
        )
    limit, length = launch.actor_model.max_position_embeddings, batches.max_length(view)
    if length > limit:
        lines.append(
            f"prompt and response together are {length} tokens, the model's max_position_embeddings is {limit}: verl refuses "
            f"that unless {MODEL}.override_config raises it."
        )
    optimizer = view.text(f"{ACTOR}.optim.optimizer", "AdamW")
    if optimizer not in ("AdamW", "Adam") and not is_megatron(view):
        lines.append(f"{ACTOR}.optim.optimizer={optimizer} is counted as AdamW: two moments in the parameters' dtype.")
    return tuple(lines)


def has_flash_attention(hardware: Hardware) -> bool:
    """Whether flash-attn runs on the card: Ampere (compute capability 8.0) and later, or not known to be older."""
    capability = hardware.compute_capability
    return capability is None or parse(capability) >= (8,)


def broken_heads(view: View, launch: Launch) -> tuple[Shortfall, ...]:
    """Return the combination in which verl's engine cannot read lm_head: a fused head over FSDP2's own unit of it."""
    fused = view.flag(f"{MODEL}.use_fused_kernels", False)
    if launch.behaviour.legacy_workers or not fused or launch.actor_model.tie_word_embeddings:
        return ()
    if view.text(f"{ACTOR}.strategy", "fsdp") != "fsdp2":
        return ()
    return (fused_over_fsdp2(f"{MODEL}.use_fused_kernels", f"{ACTOR}.strategy", phase="old_log_prob"),)


def fused_over_fsdp2(fused_key: str, strategy_key: str, *, phase: str) -> Shortfall:
    """Return why a fused head and FSDP2's own unit of an untied lm_head do not go together."""
    why = (
        f"{fused_key}=true reads lm_head outside the unit that {strategy_key}=fsdp2 shards it in "
        "(mixed torch.Tensor and DTensor): take one of the two"
    )
    return Shortfall(phase=phase, num_bytes=1, why=why)


def unset_micro_batches(view: View, launch: Launch) -> tuple[str, ...]:
    """Return the micro-batches that verl refuses to start without; a prediction takes a rank's whole batch at once."""
    names = [name for name in batches.active(view, launch) if name != batches.VALUES]  # they follow the critic's update
    passes = {f"{batches.pass_keys(n, launch).micro_key}_per_gpu": batches.batch(view, launch, n) for n in names}
    return tuple(
        f"{key} is unset without use_dynamic_bsz, and verl refuses that. Set it (the prediction takes a rank's whole batch "
        f"of {batch.local_sequences} sequences at once), or let memfit plan fill in the largest that fits."
        for key, batch in passes.items()
        if not batch.dynamic and batch.micro_batch is None
    )


def _unread_critic_batch(view: View, launch: Launch) -> list[Change]:
    """The critic of 0.8 and later reads its token budget alone, and its config class insists on a micro-batch."""
    key = "critic.ppo_micro_batch_size"
    given = any(view.optional_integer(k) is not None for k in (key, f"{key}_per_gpu"))
    asked = view.flag("critic.use_dynamic_bsz", view.flag(f"{ACTOR}.use_dynamic_bsz", False))
    if launch.critic_model is None or not launch.behaviour.critic_always_dynamic or asked or given:
        return []
    why = "verl refuses an unset value, although its critic reads the token budget instead"
    return [Change(key=f"{key}_per_gpu", old=None, new=1, kind="neutral", why=why)]

"""The keys of verl that the planner may set, in the order in which they are spent, cheapest in speed first.

The order follows what each knob costs: nothing (a setting that only wastes memory), a few more micro-batches, more
transfers over PCIe, more communication, recomputation, a slower engine. docs/verl.md says what each one relieves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hydra_plugins.memfit.base.units import ceil_div, round_up
from hydra_plugins.memfit.frameworks.common_knobs import bf16_states, host_policy, shorter, switch
from hydra_plugins.memfit.frameworks.verl import batches, engines, others
from hydra_plugins.memfit.frameworks.verl import read as r
from hydra_plugins.memfit.frameworks.verl.batches import uses_reference
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, REF, REWARD, ROLLOUT, TENSOR_PARALLEL, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import is_megatron
from hydra_plugins.memfit.frameworks.verl.megatron_knobs import megatron_knobs
from hydra_plugins.memfit.frameworks.verl.micro_batches import divisors, micro_batches
from hydra_plugins.memfit.frameworks.verl.surroundings import ulysses_sizes
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import SOLVE, Knob

_CRITIC_PASSES = (batches.UPDATE_CRITIC, batches.VALUES)


def knobs(view: View, launch: Launch) -> tuple[Knob, ...]:
    """Return the knobs of the composed config, with the candidates that verl's own checks accept."""
    trainer = (megatron_knobs,) if is_megatron(view) else (_offloads, _memory_for_compute)
    groups = (_free, micro_batches, others.knobs, _engine, *trainer, _semantic)
    return tuple(knob for group in groups for knob in group(view, launch))


def _switch(view: View, key: str, *, cost: int, why: str, default: bool = False) -> Iterator[Knob]:
    """A flag that saves memory when it is on; where it is on, switching it off is faster."""
    if view.section(key.rpartition(".")[0]):
        yield from switch(view, key, cost=cost, why=why, default=default, back=True)


def _saver(view: View, key: str, *, cost: int, why: str, default: bool = False) -> Iterator[Knob]:
    """A flag that saves memory when it is on, and that memfit never switches off."""
    if not view.flag(key, default):
        yield from _switch(view, key, cost=cost, why=why, default=default)


# -- costs nothing --------------------------------------------------------------------------------------------------
def _free(view: View, launch: Launch) -> Iterator[Knob]:
    if launch.behaviour.keeps_root_after_inference and launch.world_size > 1:
        for section in (f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config"):
            key = f"{section}.fsdp_size"
            if view.section(section) and view.integer(key, -1, minimum=-1) <= 0:
                why = "the same sharding, and verl frees the gathered embedding after log-probabilities"
                yield Knob(key=key, requested=view.requested(key), candidates=(launch.world_size,), cost=10, why=why)
    if view.optional_integer(f"{ROLLOUT}.max_model_len") is None and _single_turn(view):
        key, need = f"{ROLLOUT}.max_model_len", batches.max_length(view)
        if need < engines.max_model_len(view, launch):
            why = "prompt + response; unset, the engine reserves the model's longest context"
            yield Knob(key=key, requested=None, candidates=(need,), cost=12, why=why)
    yield from _bucket(view, launch)
    if view.integer(f"{MODEL}.lora_rank", 0, minimum=0) and view.has(f"{ROLLOUT}.layered_summon"):
        yield from _layered_summon(view)


def _layered_summon(view: View) -> Iterator[Knob]:
    """verl refuses it where the engine does not load the base model itself."""
    why = "adapters are collected layer by layer instead of gathering the whole base model"
    loading = f"{ROLLOUT}.load_format"
    dummy = "dummy" in view.text(loading, "dummy")
    for knob in _saver(view, f"{ROLLOUT}.layered_summon", cost=16, why=why):
        yield replace(knob, companions=lambda value: {loading: "safetensors"} if value and dummy else {})


def _single_turn(view: View) -> bool:
    return not view.flag(f"{ROLLOUT}.multi_turn.enable", False)


def _bucket(view: View, launch: Launch) -> Iterator[Knob]:
    key = launch.behaviour.bucket_key
    if key is None or not view.section(key.rpartition(".")[0]):
        return
    now = view.integer(key, launch.behaviour.bucket_default)
    smaller = tuple(size for size in (1024, 512, 256) if size < now and size << 20 >= r.smallest_bucket_bytes(launch))
    if smaller:
        why = "a smaller buffer for the weight transfer"
        yield Knob(key=key, requested=view.requested(key), candidates=smaller, cost=14, why=why)


# -- the engine -----------------------------------------------------------------------------------------------------
def _engine(view: View, launch: Launch) -> Iterator[Knob]:
    concurrent = engines.concurrent_sequences(view, launch)
    seqs = view.integer(f"{ROLLOUT}.max_num_seqs", 1024)
    if max(16, concurrent) < seqs:
        why = "no more sequences than one engine ever has in flight"
        key = f"{ROLLOUT}.max_num_seqs"
        yield Knob(key=key, requested=view.requested(key), candidates=(max(16, concurrent),), cost=18, why=why)
    batched = view.integer(f"{ROLLOUT}.max_num_batched_tokens", 8192)
    if view.flag(f"{ROLLOUT}.enable_chunked_prefill", True) and launch.behaviour.null_model_len_is_model_limit:
        smaller = tuple(size for size in (4096, 2048) if min(seqs, max(16, concurrent)) <= size < batched)
        if smaller:
            why = "a smaller prefill chunk: less workspace in the engine"
            key = f"{ROLLOUT}.max_num_batched_tokens"
            yield Knob(key=key, requested=view.requested(key), candidates=smaller, cost=32, why=why)
    why = "the largest useful share of the GPU that leaves room for the trainer"
    for share in launch.share_keys:
        yield Knob(key=share, requested=view.requested(share), candidates=(SOLVE,), cost=30, why=why, fast=(SOLVE,))
    if launch.behaviour.engine_share_is_own or not view.flag(f"{ROLLOUT}.free_cache_engine", True):
        why = "no CUDA graphs: they stay on the GPU while the engine sleeps"
        yield from _switch(view, f"{ROLLOUT}.enforce_eager", cost=50, why=why)
    yield from _tensor_parallel(view, launch)


def _tensor_parallel(view: View, launch: Launch) -> Iterator[Knob]:
    now = view.integer(TENSOR_PARALLEL, 2)
    if view.integer(f"{ROLLOUT}.expert_parallel_size", 1) > 1:  # verl wants it equal to TP x DP
        return
    possible = [s for s in (1, 2, 4, 8, 16) if engines.engine_splits(view, launch, s)]
    sizes = [s for s in possible if s > now and all(gpus % s == 0 for gpus in launch.engine_gpus_per_node)]
    faster = tuple(s for s in possible if s < now)
    if sizes or faster:
        why = "the engine's weights and cache are spread over more GPUs"
        yield Knob(
            key=TENSOR_PARALLEL,
            requested=view.requested(TENSOR_PARALLEL),
            candidates=tuple(sizes),
            cost=40,
            why=why,
            fast=faster,
        )


# -- host memory ----------------------------------------------------------------------------------------------------
def _offloads(view: View, launch: Launch) -> Iterator[Knob]:
    sections = [(f"{ACTOR}.fsdp_config", "the actor's")]
    if launch.critic_model is not None:
        sections.append((launch.behaviour.critic_fsdp, "the critic's"))
    for section, whose in sections:
        why = f"{whose} optimizer states wait in host memory while others run"
        yield from _switch(view, f"{section}.optimizer_offload", cost=34, why=why)
        why = f"{whose} parameters wait in host memory while others run"
        yield from _switch(view, f"{section}.param_offload", cost=36, why=why)


# -- compute or communication for memory ----------------------------------------------------------------------------
def _memory_for_compute(view: View, launch: Launch) -> Iterator[Knob]:
    yield from _wider_shards(view, launch)
    if launch.behaviour.legacy_workers or not view.flag(f"{MODEL}.use_remove_padding", True):
        why = "no compute and no memory for padding"
        yield from _saver(view, f"{MODEL}.use_remove_padding", cost=42, why=why)
    if batches.SCORES in batches.active(view, launch):
        why = "no compute and no memory for the reward model's padding"
        yield from _saver(view, f"{REWARD}.model.use_remove_padding", cost=42, why=why)
    why = "one more forward pass instead of keeping every layer's activations"
    yield from _switch(view, f"{MODEL}.enable_gradient_checkpointing", cost=44, why=why, default=True)
    yield from _ulysses(view, launch)
    if launch.actor_model.num_hidden_layers >= 3:
        why = "saved layer inputs wait in host memory"
        yield from _switch(view, f"{MODEL}.enable_activation_offload", cost=48, why=why)
    if view.has(f"{MODEL}.use_fused_kernels") and launch.behaviour.expandable_in_trainer:
        why = "log-probabilities in chunks, without the matrix of all logits"
        yield from _saver(view, f"{MODEL}.use_fused_kernels", cost=52, why=why)
    yield from _host_policy(view)
    if launch.critic_model is not None:
        yield from _critic(view, launch, launch.critic_model)


def _critic(view: View, launch: Launch, model: ModelSpec) -> Iterator[Knob]:
    why = "no compute and no memory for the critic's padding"
    yield from _saver(view, "critic.model.use_remove_padding", cost=42, why=why)
    why = "one more forward pass of the critic instead of keeping every layer's activations"
    yield from _switch(view, "critic.model.enable_gradient_checkpointing", cost=44, why=why, default=True)
    yield from _critic_ulysses(view, launch, model)
    if model.num_hidden_layers >= 3:
        why = "the critic's saved layer inputs wait in host memory"
        yield from _switch(view, "critic.model.enable_activation_offload", cost=48, why=why)
    section = launch.behaviour.critic_fsdp
    yield from _policy(view, f"{section}.offload_policy", ["critic.strategy"], "the critic's", cost=61)


def _wider_shards(view: View, launch: Launch) -> Iterator[Knob]:
    """Fewer copies of the parameters where each group of ``fsdp_size`` GPUs holds one of its own (HSDP)."""
    sections = [f"{ACTOR}.fsdp_config"]
    sections += [f"{REF}.fsdp_config"] if uses_reference(view) else []
    sections += [launch.behaviour.critic_fsdp] if launch.critic_model is not None else []
    for section in sections:
        key, world = f"{section}.fsdp_size", launch.world_size
        now = view.integer(key, -1, minimum=-1)
        wider = tuple(size for size in reversed(divisors(world)) if size > now)
        if 0 < now < world:
            why = "one copy of the parameters over more GPUs; more communication"
            yield Knob(key=key, requested=view.requested(key), candidates=wider, cost=38, why=why)


def _ulysses(view: View, launch: Launch) -> Iterator[Knob]:
    if not view.flag(f"{MODEL}.use_remove_padding", False):
        return
    key, now = f"{ACTOR}.ulysses_sequence_parallel_size", batches.sequence_parallel(view)
    sizes = _sizes(now, launch.actor_model, launch, sequences=batches.mini_sequences(view))
    if sizes:
        yield Knob(
            key=key,
            requested=view.requested(key),
            candidates=sizes,
            cost=46,
            why="a sequence is spread over several GPUs",
            companions=lambda value: _spread(view, launch, value),
            companions_required=False,
        )


def _critic_ulysses(view: View, launch: Launch, model: ModelSpec) -> Iterator[Knob]:
    key, now = batches.critic_ulysses_key(launch), batches.critic_sequence_parallel(view, launch)
    if not view.has(key) or not view.flag("critic.model.use_remove_padding", False):
        return
    sizes = _sizes(now, model, launch, sequences=batches.critic_mini_sequences(view))
    if sizes:
        yield Knob(
            key=key,
            requested=view.requested(key),
            candidates=sizes,
            cost=47,
            why="a sequence of the critic is spread over several GPUs",
            companions=lambda value: _budgets_of(view, launch, _CRITIC_PASSES, value) if value != now else {},
            companions_required=False,
        )


def _sizes(now: int, model: ModelSpec, launch: Launch, *, sequences: int) -> tuple[int, ...]:
    gpus, world = launch.gpus_per_node, launch.world_size
    return ulysses_sizes(model, above=now, gpus_per_node=gpus, world_size=world, sequences=sequences)


def _spread(view: View, launch: Launch, size: object) -> dict[str, object]:
    """The reference follows the actor, and a token budget per GPU may fall below one sequence."""
    reference, now = f"{REF}.ulysses_sequence_parallel_size", batches.sequence_parallel(view)
    if size == now:
        return {}
    follows = view.has(reference) and view.integer(reference, 1) == now
    names = tuple(name for name in batches.active(view, launch) if name not in (*_CRITIC_PASSES, batches.SCORES))
    return {**({reference: size} if follows else {}), **_budgets_of(view, launch, names, size)}


def _budgets_of(view: View, launch: Launch, names: tuple[str, ...], size: object) -> dict[str, object]:
    """Token budgets for each GPU when ``size`` of them share a sequence."""
    found: dict[str, object] = {}
    for name in names:
        batch = batches.batch(view, launch, name)
        if batch.dynamic and isinstance(size, int):
            least = ceil_div(batch.max_length, size)
            key = batches.pass_keys(name, launch).budget_key
            found[key] = min(batch.budget, round_up(least, 64) if batch.hard_budget else least)
    return found


def _host_policy(view: View) -> Iterator[Knob]:
    key = f"{ACTOR}.fsdp_config.offload_policy"
    if not view.has(key) or view.flag(key, False) or view.integer(f"{MODEL}.lora_rank", 0, minimum=0):
        return
    strategies = [f"{ACTOR}.strategy", *([f"{REF}.strategy"] if uses_reference(view) else [])]
    yield from _policy(view, key, strategies, "the actor's", cost=60)


def _policy(view: View, key: str, strategies: list[str], whose: str, *, cost: int) -> Iterator[Knob]:
    if view.has(key) and not view.flag(key, False):
        yield host_policy(view, key, cost=cost, whose=f"{whose} ", follow=dict.fromkeys(strategies, "fsdp2"))


# -- what is trained ------------------------------------------------------------------------------------------------
def _semantic(view: View, launch: Launch) -> Iterator[Knob]:
    key = f"{ACTOR}.fsdp_config.model_dtype"
    if view.has(key) and r.master_bytes(view, f"{ACTOR}.fsdp_config") == 4:
        yield bf16_states(view, key)
    key = "data.max_response_length"
    yield from shorter(
        view,
        key,
        view.integer(key, 512),
        why="shorter responses",
        companions=lambda value: _shorter(view, launch, value),
        companions_required=False,
    )


def _shorter(view: View, launch: Launch, length: object) -> dict[str, object]:
    """Token budgets that stood at their floor follow the shorter sequence."""
    floor = view.integer("data.max_prompt_length", 512) + (length if isinstance(length, int) else 0)
    followers = (
        f"{ACTOR}.ppo_max_token_len_per_gpu",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
        f"{REF}.log_prob_max_token_len_per_gpu",
    )
    if not view.flag(f"{ACTOR}.use_dynamic_bsz", False):
        return {}
    return {key: -(-floor // batches.sequence_parallel(view)) for key in followers if view.has(key)}

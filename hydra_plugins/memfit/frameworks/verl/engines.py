"""A rollout section of verl's config -> `Engine`: the policy's own, and those of other models, which have the same keys."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.batches import max_length, mini_sequences, sequences_per_step
from hydra_plugins.memfit.frameworks.verl.launch import FRACTION, LORA_MERGE, MODEL, ROLLOUT, TENSOR_PARALLEL, Launch
from hydra_plugins.memfit.frameworks.verl.recipes import FULLY_ASYNC
from hydra_plugins.memfit.frameworks.verl.versions import engine_share, parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import SOLVE, Knob

_SAMPLES_PER_REPLICA = 16
"""Prompts that fully asynchronous training keeps in flight on one engine (async_training.concurrent_samples_per_replica in
0.9, the same number in the code before)."""


def engine_name(view: View, section: str, *, why: str = "rollouts") -> str:
    """Return the inference engine of a rollout section; the framework's own ??? reads as vLLM."""
    key = f"{section}.name"
    name = view.text(key, "vllm").removesuffix("_async")
    if name not in defaults.ENGINES:
        raise NotModelled(
            f"{key}={name}: memfit models {why} with vllm and sglang. Set {key}=vllm, or go on unplanned with "
            "memfit.strict=false."
        )
    return name


def rollout_name(view: View) -> str:
    """Return the policy's inference engine."""
    return engine_name(view, ROLLOUT)


def model_len(view: View, launch: Launch, section: str, model: ModelSpec, *, lengths: int) -> int:
    """Return the sequence length that an engine is started with; ``lengths``: prompt and response together."""
    asked = view.optional_integer(f"{section}.max_model_len")
    if asked is not None:
        return asked
    return model.max_position_embeddings if launch.behaviour.null_model_len_is_model_limit else lengths


def max_model_len(view: View, launch: Launch) -> int:
    """Return the sequence length that the policy's engine is started with."""
    return model_len(view, launch, ROLLOUT, launch.actor_model, lengths=max_length(view))


def section_engine(
    view: View, launch: Launch, section: str, *, model: ModelSpec, share_key: str, lengths: int, concurrent: int
) -> Engine:
    """
    Return the engine that a rollout section describes, as a process of its own that sleeps if the section lets it.

    ``lengths``: tokens of the longest sequence in use; ``concurrent``: sequences that one engine has in flight.
    """
    name = engine_name(view, section)
    fraction, close_to = _fractions(view, share_key)
    longest = model_len(view, launch, section, model, lengths=lengths)
    batched = view.integer(f"{section}.max_num_batched_tokens", 8192)
    if not view.flag(f"{section}.enable_chunked_prefill", True):
        batched = max(batched, longest)
    eager = view.flag(f"{section}.enforce_eager", parse(launch.version) < (0, 6))
    element = 4 if view.text(f"{section}.dtype", "bfloat16") in ("float32", "fp32", "float") else 2
    return Engine(
        model=model,
        share_of=engine_share(name, launch.engine_version_of(name)),
        fraction=fraction,
        requested_fraction=close_to,
        at_least_useful=launch.settings.goal == "fast",
        tensor_parallel=view.integer(f"{section}.tensor_model_parallel_size", 2),
        expert_parallel=view.integer(f"{section}.expert_parallel_size", 1),
        max_model_len=longest,
        max_num_seqs=view.integer(f"{section}.max_num_seqs", 1024),
        max_num_batched_tokens=batched,
        concurrent_sequences=concurrent,
        tokens_per_sequence=min(lengths, longest),
        graphs=not eager,
        weight_bytes_per_parameter=1.0 if view.text(f"{section}.quantization", "none") == "fp8" else float(element),
        kv_bytes_per_element=element,
        kv_pool_bytes=view.optional_integer(f"{section}.engine_kwargs.vllm.kv_cache_memory_bytes", largest=None)
        if name == "vllm"
        else None,
        sleeps=view.flag(f"{section}.free_cache_engine", True) and view.flag(f"{section}.enable_sleep_mode", True),
    )


def _fractions(view: View, key: str) -> tuple[float | None, float | None]:
    """The fraction in force (``None`` while it is being solved for), and the one to stay close to."""
    if view.raw(key) is not SOLVE:
        return view.number(key, 0.5, low=0.0, high=1.0), None
    asked = view.composed(key)
    return None, float(asked) if isinstance(asked, (int, float)) else None


# -- the policy's engines -------------------------------------------------------------------------------------------
def rollout_engine(view: View, launch: Launch, *, share_key: str = FRACTION) -> Engine:
    """Return the policy's engine, wherever it stands."""
    return section_engine(
        view,
        launch,
        ROLLOUT,
        model=launch.actor_model,
        share_key=share_key,
        lengths=max_length(view),
        concurrent=concurrent_sequences(view, launch),
    )


def serves_adapters(view: View) -> bool:
    """Whether the engine holds the base model and receives LoRA adapters."""
    return view.integer(f"{MODEL}.lora_rank", 0, minimum=0) > 0 and not view.flag(LORA_MERGE, False)


def concurrent_sequences(view: View, launch: Launch) -> int:
    """Return the sequences that one of the policy's engines has in flight at most."""
    replicas = max(1, sum(launch.engine_worlds) // view.integer(TENSOR_PARALLEL, 2))
    if launch.placement.entry != FULLY_ASYNC:
        return ceil_div(sequences_per_step(view), replicas)
    samples = view.integer(f"{ROLLOUT}.n", 1)
    per_replica = view.integer("async_training.concurrent_samples_per_replica", _SAMPLES_PER_REPLICA) * samples
    ahead = 1 + view.number("async_training.staleness_threshold", 1.0, low=0.0, high=1e6)
    steps = view.integer("async_training.trigger_parameter_sync_step", 1) * view.integer(
        "async_training.require_batches", 1
    )
    return min(per_replica, ceil_div(int(mini_sequences(view) * steps * ahead), replicas))


def engine_splits(view: View, launch: Launch, size: int) -> bool:
    """Whether the policy's engine can be spread over ``size`` GPUs."""
    return divides(view, ROLLOUT, launch.actor_model, launch.engine_worlds, size)


def divides(view: View, section: str, model: ModelSpec, worlds: tuple[int, ...], size: int) -> bool:
    """Whether an engine can spread a model over ``size`` GPUs: the pools, attention and key/value heads divide."""
    replica = size * view.integer(f"{section}.data_parallel_size", 1)
    replica *= view.integer(f"{section}.pipeline_model_parallel_size", 1)
    kv_heads = model.num_attention_heads if model.kv_lora_rank else model.num_key_value_heads
    if any(world % replica for world in worlds) or model.num_attention_heads % size:
        return False
    return kv_heads % size == 0 or size % kv_heads == 0


def share_knob(view: View, key: str, *, cost: int) -> Knob:
    """Return the knob of an engine's share, which is solved for."""
    why = "the largest useful share of the GPU that leaves room for the rest"
    return Knob(key=key, requested=view.requested(key), candidates=(SOLVE,), cost=cost, why=why, fast=(SOLVE,))

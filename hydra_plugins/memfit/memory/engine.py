"""The inference engine's share of one GPU: weights, KV pool, forward workspace, CUDA graphs.

vLLM's ``gpu_memory_utilization`` and SGLang's ``mem_fraction_static`` are fractions of different things, and vLLM's changed
its meaning twice; `SHARES` names the readings.

Sources: vLLM v1/worker/gpu_worker.py (0.8.5, 0.11, 0.24), v1/core/kv_cache_utils.py, v1/sample/sampler.py; SGLang
model_executor/model_runner.py and model_runner_kv_cache_mixin.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.kv_cache import paged_kv_bytes
from hydra_plugins.memfit.memory.overheads import (
    GRAPH_BYTES_PER_LAYER,
    SGLANG_GRAPH_BYTES_PER_LAYER,
    engine_context_bytes,
    engine_profiled_bytes,
)
from hydra_plugins.memfit.memory.sampling import FP32, INT64, sort_scratch_bytes
from hydra_plugins.memfit.model.spec import ModelSpec

SHARES = ("device", "own", "own_with_graphs", "free")
"""What the engine's fraction is a fraction of:
``device``           everything on the GPU, the trainer's tensors in the same process too (vLLM before 0.11)
``own``              the engine's own use, of the total; CUDA graphs and the process's context come on top (vLLM 0.11 - 0.20)
``own_with_graphs``  the same with the graphs inside (vLLM 0.21 and later)
``free``             weights and KV pool, of what is free when the engine starts; all else comes on top (SGLang)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One rank of an inference engine on one GPU."""

    model: ModelSpec
    share_of: str
    """One of `SHARES`."""
    fraction: float | None
    """The engine's fraction; ``None``: the largest useful one that fits is solved for."""
    requested_fraction: float | None = None
    """The fraction to stay close to when one is solved for."""
    at_least_useful: bool = False
    """Raise the requested fraction to the useful one, where that fits."""
    tensor_parallel: int
    expert_parallel: int = 1
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    concurrent_sequences: int
    """Sequences that one replica has in flight at most: a KV pool beyond them is of no use."""
    tokens_per_sequence: int
    graphs: bool
    weight_bytes_per_parameter: float = 2
    kv_bytes_per_element: int = 2
    kv_pool_bytes: int | None = None
    """The KV pool where it is given in bytes instead of as what the share leaves (vLLM's kv_cache_memory_bytes)."""
    in_process: bool = False
    sleeps: bool = True
    keeps_weights: bool = False
    """A sleep frees the KV pool alone (SGLang that serves LoRA adapters)."""
    weights_on_host: bool = False
    """Sleep level 1, or SGLang's CPU backup: the weights are kept in pinned host memory."""


def weight_bytes(e: Engine) -> int:
    """
    Return the engine's weights on one rank.

        M = b · (P - P_experts) / TP + b · P_experts / max(TP, EP)

    A quantized engine keeps the vocabulary matrices in 2 bytes.

    Leaves out: replicated norms (under 0.1 %), padding of the vocabulary to a multiple of 64.
    """
    dense = e.model.parameters - e.model.expert_parameters
    experts = e.model.expert_parameters
    total = dense / e.tensor_parallel + experts / max(e.tensor_parallel, e.expert_parallel)
    unquantized = max(0.0, 2 - e.weight_bytes_per_parameter) * e.model.root_parameters / e.tensor_parallel
    return int(e.weight_bytes_per_parameter * total + unquantized) + 1


def workspace_bytes(e: Engine) -> int:
    """
    Return the peak of the engine's forward pass in its profile run.

        body       t · (4h + 6 · max(m, q)/TP)           t tokens of a batch, s sequences
        sampler    c · 4 · min(s, t) · V                 c fp32 copies: 2 in vLLM before 0.11, else 3
        M = body + sampler
        M = max(body, 2h · t + (2 + 4 + 12 + scratch) · min(s, t) · V)      vLLM 0.11 - 0.20

    The run picks a token for each sequence by top-k and top-p. vLLM 0.11 sorts for it: bf16 logits, their fp32 copy, sorted
    scores with int64 indices, the sort's scratch. A kernel does it without a sort since 2026 (vLLM pull request 33538), and
    FlashInfer did where it was installed before 0.11, as in verl's images; without it those releases sort as well.
    Logits are gathered over the tensor-parallel ranks.

    Source: vLLM v1/worker/gpu_model_runner.py (``_dummy_sampler_run``), v1/sample/ops/topk_topp_sampler.py; `sort_scratch_bytes`.
    """
    model, tokens = e.model, e.max_num_batched_tokens
    if model.num_experts:
        wide = model.num_experts_per_tok * (model.moe_intermediate_size + model.hidden_size)
        wide += model.shared_expert_intermediate_size
    else:
        wide = max(model.intermediate_size, model.num_attention_heads * model.head_dim)
    body = tokens * (4 * model.hidden_size + ceil_div(6 * wide, e.tensor_parallel))
    rows = min(e.max_num_seqs, tokens)
    if e.share_of == "own":
        score = 2 + 2 * FP32 + INT64 + sort_scratch_bytes(rows)
        return max(body, 2 * model.hidden_size * tokens + score * rows * model.vocab_size)
    copies = 2 if e.share_of == "device" else 3
    return body + copies * FP32 * rows * model.vocab_size


def prompt_log_prob_bytes(e: Engine) -> int:
    """
    Return what log-probabilities of a prompt take on top of the profile run: whole rows of logits of one chunk.

        M = 10 · t · V      (t tokens of a batch, never more than one sequence)

    bf16 logits, their fp32 copy, and the fp32 result of log_softmax; gathered over the tensor-parallel ranks.

    Source: vLLM v1/worker/gpu_model_runner.py (_get_prompt_logprobs_dict), v1/sample/sampler.py (compute_logprobs).
    Newer model runners go through the rows in pieces; the term is then an upper bound.
    """
    return 10 * min(e.max_num_batched_tokens, e.tokens_per_sequence) * e.model.vocab_size


def graph_bytes(e: Engine) -> int:
    """Return the CUDA graphs, which a sleeping engine keeps."""
    per_layer = SGLANG_GRAPH_BYTES_PER_LAYER if e.share_of == "free" else GRAPH_BYTES_PER_LAYER
    return e.model.num_hidden_layers * per_layer if e.graphs else 0


def context_bytes(e: Engine) -> int:
    """Return the engine's memory outside torch."""
    return engine_context_bytes(tensor_parallel=e.tensor_parallel, in_process=e.in_process)


def minimum_kv_bytes(e: Engine) -> int:
    """Return the KV pool that the engine insists on: one sequence of ``max_model_len`` tokens."""
    return paged_kv_bytes(
        e.model,
        tokens=e.max_model_len,
        tensor_parallel=e.tensor_parallel,
        element_bytes=e.kv_bytes_per_element,
    )


def useful_kv_bytes(e: Engine) -> int:
    """Return the KV pool that holds every sequence in flight at its full length; more is never used."""
    sequences = max(1, min(e.concurrent_sequences, e.max_num_seqs))
    return max(
        minimum_kv_bytes(e),
        paged_kv_bytes(
            e.model,
            tokens=e.tokens_per_sequence,
            sequences=sequences,
            tensor_parallel=e.tensor_parallel,
            element_bytes=e.kv_bytes_per_element,
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """What an engine's fraction means in bytes on one GPU."""

    base: int
    """Bytes of which the fraction is taken."""
    inside: int
    """Bytes inside the fraction that are not KV: what the pool must exceed."""
    outside: int
    """Bytes that the engine takes on top of its fraction."""
    given: int | None = None
    """The KV pool, where its size is given."""

    def kv_bytes(self, fraction: float) -> int:
        """Return the KV pool; negative when the fraction does not even hold what comes first."""
        return int(self.base * fraction) - self.inside if self.given is None else self.given


def pool(e: Engine, *, capacity: int, trainer_at_launch: int) -> Pool:
    """Return how the engine's fraction divides ``capacity``, given what the trainer holds when the engine starts."""
    weights, workspace, graphs, context = weight_bytes(e), workspace_bytes(e), graph_bytes(e), context_bytes(e)
    if e.share_of == "free":
        return Pool(
            base=max(0, capacity - trainer_at_launch - context),
            inside=weights,
            outside=workspace + graphs + context,
            given=e.kv_pool_bytes,
        )
    if e.share_of == "device":
        return Pool(
            base=capacity,
            inside=trainer_at_launch + weights + workspace + context,
            outside=graphs,
            given=e.kv_pool_bytes,
        )
    profiled = min(context, engine_profiled_bytes(tensor_parallel=e.tensor_parallel))
    later = graphs if e.share_of == "own" else 0
    return Pool(
        base=capacity,
        inside=weights + workspace + profiled + graphs - later,
        outside=context - profiled + later,
        given=e.kv_pool_bytes,
    )


def awake(e: Engine, *, kv: int) -> MemoryBreakdown:
    """Return the engine while it generates, with a KV pool of ``kv`` bytes."""
    return MemoryBreakdown(
        weights=weight_bytes(e),
        activations=workspace_bytes(e),
        kv_cache=max(0, kv),
        context=context_bytes(e),
        engine_residual=graph_bytes(e),
    )


def asleep(e: Engine, *, kv: int) -> MemoryBreakdown:
    """Return the engine while others train: its context and graphs; everything when it does not sleep."""
    if not e.sleeps:
        return awake(e, kv=kv)
    weights = weight_bytes(e) if e.keeps_weights else 0
    return MemoryBreakdown(weights=weights, engine_residual=graph_bytes(e) + context_bytes(e))


def receiving(e: Engine, *, kv: int) -> MemoryBreakdown:
    """Return the engine while new weights arrive: weights mapped, KV pool not yet, unless it never left."""
    if not e.sleeps:
        return awake(e, kv=kv)
    return MemoryBreakdown(weights=weight_bytes(e), engine_residual=graph_bytes(e) + context_bytes(e))

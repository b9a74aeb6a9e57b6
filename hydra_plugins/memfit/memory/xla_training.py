"""HBM of one TPU device in a GRPO run compiled by XLA: a decoder trained with fp32 master weights and bf16 compute.

Symbols: P parameters on the device's mesh (a tied lm_head that the runner keeps apart counts twice), S = fsdp·tp shards of
one copy, N layers, D hidden, F feed-forward, Q and K widths of the query and of the key projection, V vocabulary,
T = sequences per device x padded tokens.

The state is exact: it is what the compiler calls arguments. The temporaries are the compiler's own choice; what is
modelled is the largest of three moments of the step, as its live ranges show them (jax 0.8.2, libtpu 0.0.32). The constants
below that are no counts of arrays were read from compiled programs: tests/data/tpu_verdicts.json, rows with ``split: fit``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.model.spec import ModelSpec

FP32 = 4
BF16 = 2
MOMENTS = {"sgd": 0, "lion": 1, "adamw": 2}
"""fp32 arrays of the size of the parameters that an optimizer keeps (optax: lion mu; adamw mu and nu)."""
REMAT = ("dots_with_no_batch_dims", "nothing_saveable", "layer")
"""What the backward pass finds saved: every projection output, nothing, or the input of each layer."""

SAVED_FEED_FORWARD, SAVED_HIDDEN = 2, 2
"""Outputs that ``dots_with_no_batch_dims`` saves, a layer and a token: gate and up; o and down (q, k, v beside them)."""
RECOMPUTED_FEED_FORWARD, RECOMPUTED_HIDDEN = 1, 3
"""Recomputed with the trunk, all layers at once: silu(gate)·up; two norms and the residual (attention output beside)."""
NOTHING_SAVED_FEED_FORWARD = 0.5
"""What ``nothing_saveable`` holds more than that, a layer and a token: it recomputes gate and up too, all layers at once."""
KERNEL = 128
"""The attention kernel's block: other head sizes or lengths make an fp32 score matrix, recomputed in all layers at once."""
PREFETCHED_COPIES = 2
"""Copies of the device's own shards, cast to bf16, that the compiler keeps for its overlapped collectives."""
PREFETCHES_FROM = 8
"""Devices from which on it does so: seen on 8 (v4-16, v6e-8; one copy of the state or two), never on 4 (v4-8)."""
VOCABULARY_HOLE = 0.6
"""Share of one (T, V) array that the heap cannot use again once the logits are gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class XlaStep:
    """One training step and the mesh that it runs on."""

    model: ModelSpec
    separate_head: bool
    """Whether lm_head is an array of its own where the checkpoint ties it to the embedding."""
    data_parallel: int
    shards: int
    """fsdp x tp: devices that share one copy of the state."""
    tensor_parallel: int = 1
    """Size of the axis tp; its devices work on the same sequences."""
    sequences: int
    """Sequences of one device in one micro-batch."""
    tokens: int
    """Padded tokens of one sequence."""
    optimizer: str = "lion"
    accumulates: bool = False
    """Whether an fp32 buffer of gradient accumulation is part of the state."""
    reference: bool = False
    """Whether a frozen fp32 copy of the parameters is held for the KL term."""
    remat: str = "dots_with_no_batch_dims"

    @property
    def parameters(self) -> int:
        """Parameters of one copy, as they lie on the devices."""
        doubled = self.separate_head and self.model.tie_word_embeddings
        return self.model.parameters + (self.model.embedding_parameters if doubled else 0)


def state(step: XlaStep) -> MemoryBreakdown:
    """
    Return the resident training state of one device.

        M = P · (4 + 4·[reference] + 4·moments + 4·[accumulates]) / S

    Leaves out: the replicated biases and norm scales (below 0.1 %).
    Checks: 7B with lion on 8 devices: 7.09 GiB; the compiler's arguments: 7.095 GiB.
    """
    share = ceil_div(step.parameters * FP32, step.shards)
    return MemoryBreakdown(
        weights=share * (2 if step.reference else 1),
        optimizer_states=share * MOMENTS[step.optimizer],
        gradients=share if step.accumulates else 0,
    )


def train_step(step: XlaStep) -> MemoryBreakdown:
    """Return the peak of one device: the state, and the larger of the two moments that decide."""
    return state(step) + max((_backward(step), _gradients(step)), key=lambda moment: moment.total_bytes)


def _backward(step: XlaStep) -> MemoryBreakdown:
    """
    Return what is alive when the trunk has been recomputed for its backward pass.

        activations   = T · 2 · N · (3·F + 5·D + Q + 2·K)      dots_with_no_batch_dims
        logits        = T · 2 · V
        fragmentation = 0.6 · T · 2 · V
        gathered      = 2 · 2 · P / S                          from 8 devices on

    D and V count tp times: T is of one device's share, and arrays of these widths are not divided among the axis tp.
    """
    positions = step.sequences * step.tokens
    logits = positions * BF16 * step.model.vocab_size * step.tensor_parallel
    copies = PREFETCHED_COPIES if step.data_parallel * step.shards >= PREFETCHES_FROM else 0
    return MemoryBreakdown(
        activations=positions * BF16 * _widths(step) + _score_bytes(step),
        logits=logits,
        communication_buffers=copies * ceil_div(step.parameters * BF16, step.shards),
        fragmentation=int(logits * VOCABULARY_HOLE),
    )


def _score_bytes(step: XlaStep) -> int:
    """Return the fp32 attention scores of all layers, where the attention kernel cannot run: 4 · N · b · H · L²."""
    if step.model.head_dim % KERNEL == 0 and step.tokens % KERNEL == 0:
        return 0
    square = step.sequences * step.model.num_attention_heads * step.tokens**2
    return FP32 * square * (1 if step.remat == "layer" else step.model.num_hidden_layers)


def _widths(step: XlaStep) -> int:
    """Return bf16 numbers per token that are alive at once in all layers together."""
    model = step.model
    query, key = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    wide = (SAVED_FEED_FORWARD + RECOMPUTED_FEED_FORWARD) * model.intermediate_size
    hidden = (SAVED_HIDDEN + RECOMPUTED_HIDDEN) * model.hidden_size * step.tensor_parallel
    layer = wide + hidden + query + 2 * key
    if step.remat == "layer":
        return model.num_hidden_layers * model.hidden_size * step.tensor_parallel + 2 * layer
    if step.remat == "nothing_saveable":
        layer += int(NOTHING_SAVED_FEED_FORWARD * model.intermediate_size)
    return model.num_hidden_layers * layer


def _gradients(step: XlaStep) -> MemoryBreakdown:
    """
    Return what is alive when all gradients wait for the clip by their global norm.

        gradients = 2 · P / S                in bf16: the kernels are cast at each use
        gathered  = 2 · 2 · V · D            gradient of the lm_head before and after its reduction over the devices
    """
    head = step.model.vocab_size * step.model.hidden_size * BF16
    return MemoryBreakdown(
        gradients=ceil_div(step.parameters * BF16, step.shards),
        communication_buffers=2 * head if step.shards > 1 else head,
    )


def rollout(step: XlaStep, *, sequences: int, prefill_tokens: int, decode_tokens: int) -> MemoryBreakdown:
    """
    Return the peak of one device while it generates, with the training state resident.

        logits   = 2 · 2 · V · b · prefill                 returned by the prefill program, whole, and its working copy
        gathered = 2 · V · D                               the lm_head, cast to bf16
        kv_cache = 4 · N · K · b · (2·prefill + decode)    the prefill's cache, and its copy padded for decoding

    Leaves out: the kernels of one layer gathered at a time.
    Check: the compiled prefill of 1.5B on v6e-8, 16 sequences a device of 512 tokens (tests/data/tpu_verdicts.json). A run of
    3B measured peak_bytes_in_use 8.234 GiB there; that counts returned arrays, not what a program works with.
    """
    model = step.model
    key = model.num_key_value_heads * model.head_dim
    cached = 2 * BF16 * model.num_hidden_layers * key * sequences
    transient = MemoryBreakdown(
        logits=2 * BF16 * model.vocab_size * sequences * prefill_tokens,
        communication_buffers=BF16 * model.vocab_size * model.hidden_size,
        kv_cache=cached * (2 * prefill_tokens + decode_tokens),
    )
    return state(step) + transient


def engine_weight_bytes(model: ModelSpec, *, devices: int) -> int:
    """
    Return the bf16 weights that a second engine holds on each device.

        M = 2 · P / devices

    Leaves out: its KV cache, whose size is the engine's own choice.
    Check: 7B on 4 devices: 3.55 GiB; a run log leaves 5.68 GiB of 30.75 free beside a state of 21.28 GiB: 3.79 GiB held.
    """
    return ceil_div(model.parameters * BF16, devices)

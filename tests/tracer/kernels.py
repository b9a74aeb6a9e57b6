"""Stand-ins for GPU kernels that cannot run here: they allocate and keep what the kernel does, and compute nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ATTENTION = "traced_attention"
FUSED_FORWARD_SPLIT = 1024
FUSED_BACKWARD_SPLIT = 9504
"""Columns of the vocabulary per pass of verl's triton kernel. Source: verl/utils/kernel/kernels.py, verl 0.9.1."""


def _fp32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class FlashAttention(Function):
    """
    flash-attn 2's variable-length attention: q, k, v are (tokens, heads, head_dim).

    Source: csrc/flash_attn/flash_api.cpp, ``mha_varlen_fwd`` and ``mha_varlen_bwd``.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
        out = torch.empty_like(q)
        log_sum_exp = _fp32(q, q.shape[1], q.shape[0])
        seed = torch.empty(2, dtype=torch.int64, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, seed)
        ctx.sequences = sequences
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        grad = grad.contiguous()
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tokens, heads, head_dim = q.shape
        rows, multiple = tokens + 128 * ctx.sequences, 32 if head_dim <= 128 else 64
        scratch = [_fp32(q, heads, rows), _fp32(q, rows, heads, -(-head_dim // multiple) * multiple)]
        if k.shape[1] != heads:  # grouped queries: gradients of k and v for every query head, then summed
            scratch += [k.new_empty(k.shape[0], heads, head_dim), v.new_empty(v.shape[0], heads, head_dim)]
        return *grads, None


class FlashCrossEntropy(Function):
    """Source: flash_attn/ops/triton/cross_entropy.py, ``CrossEntropyLoss`` (flash-attn 2.4.3 and later)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, inplace: bool) -> Any:
        losses, log_sum_exp, z = (_fp32(logits, logits.shape[0]) for _ in range(3))
        ctx.save_for_backward(logits, log_sum_exp, labels)
        ctx.inplace = inplace
        ctx.mark_non_differentiable(z)
        return losses, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        logits = ctx.saved_tensors[0]
        return (logits if ctx.inplace else torch.empty_like(logits)), None, None


class CompiledEntropy(Function):
    """
    ``torch.compile(entropy_from_logits)``: one reduction that keeps its input and three numbers a row; the backward
    pass writes the gradient of the logits in their own dtype.

    Source: the graphs that AOTAutograd's min-cut partitioner makes of that function (tests/test_tracer_kernels.py).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        rows = logits.shape[0]
        ctx.save_for_backward(logits, _fp32(logits, rows, 1), _fp32(logits, rows, 1), _fp32(logits, rows))
        return _fp32(logits, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class FusedCrossEntropy(Function):
    """Source: verl/utils/kernel/kernels.py, ``efficient_entropy_forward`` and the split-N branch of the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *_: Any) -> Any:
        ctx.shape = hidden.shape
        hidden, labels = hidden.view(-1, hidden.shape[-1]), labels.view(-1)
        rows, splits = hidden.shape[0], -(-weight.shape[0] // FUSED_FORWARD_SPLIT)
        log_probs, entropy, maximum, sums = (_fp32(hidden, n) for n in (rows, rows, rows, 2 * rows))
        scratch = [_fp32(hidden, rows, splits) for _ in range(3)]
        scratch.append(_fp32(hidden, rows))
        ctx.save_for_backward(hidden, weight, labels, maximum, sums)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        hidden, weight = ctx.saved_tensors[:2]
        grads = torch.empty_like(hidden), torch.empty_like(weight)
        part = hidden.new_empty(hidden.shape[0], FUSED_BACKWARD_SPLIT)
        product = torch.empty_like(hidden)  # of every split but the first, before it is added
        del part, product
        return grads[0].view(ctx.shape), grads[1], None, None, None


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = False, **_: Any) -> Any:
    return FlashCrossEntropy.apply(logits, labels, inplace_backward)


def _fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float, reduction: str) -> Any:
    log_probs, entropy = FusedCrossEntropy.apply(hidden, weight, labels, temperature, reduction)
    return log_probs.unsqueeze(0), entropy.unsqueeze(0)


@contextlib.contextmanager
def installed(*, flash: bool, sequences: int, ulysses: int, padded: bool, stand_ins: bool = True) -> Iterator[None]:
    """Put the stand-ins where transformers and verl look for the kernels; without them, only attention is registered."""
    import verl.utils.experimental.torch_functional as fused_linear
    import verl.utils.kernel.linear_cross_entropy as fused_triton
    import verl.utils.torch_functional as heads
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    from tracer import delta
    from tracer.attention import interface, real_kernel

    kernel = FlashAttention.apply if stand_ins else real_kernel
    attention = interface(kernel, sequences=sequences, ulysses=ulysses, padded=padded)
    AttentionInterface.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_, **__: None)
    if not stand_ins:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(delta.installed())
        for owner, name, value in (
            (heads, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash),
            (heads, "cross_entropy_loss", _cross_entropy),
            (fused_linear, "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE", flash),
            (fused_linear, "cross_entropy_loss", _cross_entropy),
            (fused_triton, "linear_cross_entropy", _fused),
            (modeling_deepseek_v3, "is_flash_attention_requested", lambda *_: True),  # it pads v to the width of q
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield

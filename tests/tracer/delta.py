"""Stand-ins for the kernels of a gated delta net: they allocate and keep what the kernels do, and compute nothing.

transformers calls them where flash-linear-attention (0.5) and causal-conv1d (1.6) are installed, on a CUDA device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = 64
"""Tokens between two recurrent states that the kernels write down."""
MODULES = {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
"""transformers' modules with a gated delta net, and the prefix of their classes."""


def _fp32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class CausalConv1d(Function):
    """
    A depthwise convolution and its SiLU in one; (batch, channels, tokens), channels last in memory.

    Source: causal_conv1d/causal_conv1d_interface.py and cpp_functions.py.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.stride(2) != 1 and x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if x.stride(1) == 1 and grad.stride(1) != 1:
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        grads = torch.empty_like(x), _fp32(weight, *weight.shape)
        return grads[0], grads[1].to(weight.dtype)


class GatedDeltaRule(Function):
    """
    The chunked gated delta rule, q and k normalised inside: (batch, tokens, heads, head_dim), a gate in fp32.

    The variables have the names and the lifetimes of the original, whose locals live until their function returns.
    Source: fla/ops/gated_delta_rule/chunk.py, chunk_fwd.py, wy_fast.py; fla/ops/common/chunk_delta_h.py, chunk_o.py.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        q, q_rstd = torch.empty_like(q), _fp32(q, *q.shape[:-1])
        k, k_rstd = torch.empty_like(k), _fp32(k, *k.shape[:-1])
        g, o, A = GatedDeltaRule._forward(k, v, g)
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, A)
        return o

    @staticmethod
    def _forward(k: Any, v: Any, g: Any) -> Any:
        g = torch.empty_like(g)  # summed up within its chunk
        A = torch.zeros(*v.shape[:3], CHUNK, dtype=k.dtype, device=k.device)
        w, u = k.new_empty(*v.shape[:3], k.shape[3]), torch.empty_like(v)
        h, v_new = _states(k, v), torch.empty_like(u)
        o = torch.empty_like(v)
        del w, u, h, v_new
        return g, o, A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        q, _, k, _, v, g, beta, _ = ctx.saved_tensors
        dq, dk, dv, db, dg = GatedDeltaRule._backward(q, k, v, g, beta, do.contiguous())
        dq, dk = torch.empty_like(q), torch.empty_like(k)  # through the norms
        return dq, dk, dv, dg, db

    @staticmethod
    def _backward(q: Any, k: Any, v: Any, g: Any, beta: Any, do: Any) -> Any:
        w, u = k.new_empty(*v.shape[:3], k.shape[3]), torch.empty_like(v)
        h, v_new = _states(k, v), torch.empty_like(u)
        dv = torch.empty_like(do)
        dh, dv = _states(q, v), torch.empty_like(dv)
        dq, dk = q.new_empty(*v.shape[:3], q.shape[3]), k.new_empty(*v.shape[:3], k.shape[3])
        dg, dw = _fp32(g, 1, *g.shape), torch.empty_like(w)
        dg = _fp32(g, *g.shape)  # summed over blocks of head_dim
        dk2, dv, dg2, db = torch.empty_like(dk), torch.empty_like(v), torch.empty_like(g), torch.empty_like(beta)
        dg = torch.empty_like(dg)
        del w, u, h, v_new, dh, dw, dk2, dg2
        return dq, dk, dv, db, dg


def _states(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, tokens, heads, width = v.shape
    return k.new_empty(batch, -(-tokens // CHUNK), heads, k.shape[3], width)


class GatedNorm(Function):
    """RMSNorm times a gated activation. Source: fla/modules/fused_norm_gate.py, ``LayerNormGatedFunction``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(x, gate, weight, _fp32(x, x.shape[0]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, gate, weight, _ = ctx.saved_tensors
        dy = dy.contiguous()
        return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight)


class FusedRMSNormGated(torch.nn.Module):
    """The module around `GatedNorm`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> Any:
        """Return the gated norm of rows."""
        return GatedNorm.apply(x, gate, self.weight)


def _convolve(*, x: torch.Tensor, weight: torch.Tensor, **_: Any) -> Any:
    return CausalConv1d.apply(x, weight)


def delta_rule(q: Any, k: Any, v: Any, *, g: Any, beta: Any, **_: Any) -> Any:
    return GatedDeltaRule.apply(q, k, v, g, beta), None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put the stand-ins where transformers' modules keep the kernels."""
    with contextlib.ExitStack() as stack:
        for name, prefix in MODULES.items():
            module = import_module(f"transformers.models.{name}.modeling_{name}")
            for attribute, value in (
                ("causal_conv1d_fn", _convolve),
                ("chunk_gated_delta_rule", delta_rule),
                (f"{prefix}RMSNormGated", FusedRMSNormGated),
            ):
                stack.enter_context(mock.patch.object(module, attribute, value))
        yield

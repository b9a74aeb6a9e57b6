"""A mixture of experts for `tracer.megatron`: real MoELayer, TopKRouter, all-to-all dispatcher and TEGroupedMLP of megatron-core.

Tensors have no data, so routing is balanced by decree: every expert gets the same number of rows. Transformer Engine's kernels (the
grouped product, the fused permutation, the router's product) are stand-ins that allocate and keep what those do.
Sources: Transformer Engine 2.x ``pytorch/module/grouped_linear.py``, ``pytorch/permutation.py``, ``pytorch/triton/permutation.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class GroupedProduct(Function):
    """One product for each expert: keeps the rows once, and the weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: int, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(x.shape[0], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        return torch.empty_like(x), None, *(torch.empty_like(weight) for weight in weights)


class GroupedLinear(torch.nn.Module):
    """The first or the second product of all local experts; Megatron builds them with these arguments."""

    def __init__(
        self, count: int, inputs: int, outputs: int, *, config: Any, tp_comm_buffer_name: str, **_: Any
    ) -> None:
        super().__init__()
        part, first = config.expert_tensor_parallel_size, tp_comm_buffer_name == "fc1"
        shape = (outputs // part, inputs) if first else (outputs, inputs // part)
        self.width = shape[0]
        self.weights = torch.nn.ParameterList(torch.empty(shape, dtype=config.params_dtype) for _ in range(count))
        for weight in self.weights:
            weight.allreduce = config.expert_model_parallel_size == 1

    def forward(self, x: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, None]:
        """Multiply each expert's rows."""
        assert sum(rows) == x.shape[0]
        return GroupedProduct.apply(x, self.width, *self.weights), None


class Permute(Function):
    """The fused permutation: rows, their probabilities, and a map of 2E + 1 numbers a token, which is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor, rows: int) -> Any:
        ctx.shape, ctx.experts = x.shape, probs.shape[1]
        places = torch.empty(x.shape[0], 2 * probs.shape[1] + 1, dtype=torch.int32)
        ctx.save_for_backward(places)
        ctx.mark_non_differentiable(places)
        return x.new_empty(rows, x.shape[1]), probs.new_empty(rows), places

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, probs: torch.Tensor, _: Any) -> Any:
        return grad.new_empty(ctx.shape), probs.new_empty(ctx.shape[0], ctx.experts), None


class Unpermute(Function):
    """Its inverse, which adds a token's rows up; the probabilities are in the experts' activation already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.new_empty(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.new_empty(ctx.shape), None, None


class Sort(Function):
    """Rows that arrived rank by rank, put in the order of experts (or back): one number a row is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor | None) -> Any:
        ctx.save_for_backward(torch.empty(x.shape[0], dtype=torch.int32))
        ctx.probs = probs is not None
        return torch.empty_like(x), torch.empty_like(probs) if probs is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, probs: torch.Tensor | None) -> Any:
        return torch.empty_like(grad), torch.empty_like(probs) if ctx.probs and probs is not None else None


class Select(Function):
    """``masked_select``, whose size would depend on data: keeps its input and the mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(x, mask)
        return x.new_empty(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), None, None


def _gemm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, layout: str, **_: Any) -> list[torch.Tensor]:
    """The router's product, straight into its own type."""
    shape = {"TN": (b.shape[0], a.shape[0]), "NN": (b.shape[0], a.shape[1]), "NT": (b.shape[1], a.shape[1])}[layout]
    return [torch.empty(shape, dtype=dtype)]


def _weighted(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)


def _weighted_back(g: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> Any:
    return torch.empty_like(y), torch.empty_like(weights)


def _balanced(dispatcher: Any, routing_map: torch.Tensor) -> Any:
    """Megatron's ``preprocess`` when every expert gets as many rows as any other."""
    tensor, ranks, local = dispatcher.tp_size, dispatcher.ep_size, dispatcher.num_local_experts
    rows = routing_map.shape[0] * dispatcher.config.moe_router_topk
    dispatcher.num_out_tokens = rows
    dispatcher.input_splits = dispatcher.output_splits = [rows // ranks] * ranks
    dispatcher.output_splits_tp = None
    each = rows // (ranks * local)
    dispatcher.num_global_tokens_per_local_expert = np.full((tensor * ranks, local), each)
    order = np.arange(tensor * ranks * local)
    dispatcher.sort_input_by_local_experts = dispatcher.restore_output_by_local_experts = order
    return np.full(local, each * tensor * ranks)


@contextlib.contextmanager
def without_kernels(rows: int) -> Iterator[None]:
    """Put the stand-ins where megatron-core looks for Transformer Engine and CUDA streams; ``rows``: what a rank sends out."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    def permute(tokens: Any, probs: Any, _: Any, num_out_tokens: int) -> Any:
        return Permute.apply(tokens, probs, num_out_tokens)

    def unpermute(tokens: Any, places: Any, merging_probs: None = None, restore_shape: Any = None) -> Any:
        return Unpermute.apply(tokens, places, restore_shape)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "Stream", lambda *_, **__: None),
            (torch.Tensor, "masked_select", lambda x, mask: Select.apply(x, mask, rows)),
            (fused_bias_swiglu, "weighted_swiglu", _weighted),
            (fused_bias_swiglu, "weighted_swiglu_back", _weighted_back),
            (moe_utils, "HAVE_TE", True),
            (moe_utils, "te_general_gemm", _gemm),
            (moe_utils, "fused_permute_with_probs", permute),
            (moe_utils, "fused_unpermute", unpermute),
            (moe_utils, "fused_sort_chunks_by_index", lambda x, *_: Sort.apply(x, None)[0]),
            (moe_utils, "fused_sort_chunks_by_index_with_probs", lambda x, probs, *_: Sort.apply(x, probs)),
            (Dispatcher, "preprocess", _balanced),
            (Dispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, tokens=None: tokens),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def config(shape: dict[str, Any], *, expert: int) -> dict[str, Any]:
    """Return what a TransformerConfig needs beside a dense model's: no balancing loss, as verl trains."""
    return {
        "num_moe_experts": shape["num_experts"],
        "moe_router_topk": shape["num_experts_per_tok"],
        "moe_ffn_hidden_size": shape["moe_intermediate_size"],
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": 1,
    }


def layer(spec: Any) -> None:
    """Give a local layer's mixture the experts that Transformer Engine would compute."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    products = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    spec.submodules.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=products)


def routers_in_bf16(model: Any) -> None:
    """Store the routers as Float16Module would: Megatron makes them in fp32."""
    from megatron.core.transformer.moe.router import TopKRouter

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.weight = torch.nn.Parameter(module.weight.data.to(torch.bfloat16))
            module.weight.sequence_parallel = module.config.sequence_parallel

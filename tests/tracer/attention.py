"""How a model reaches the attention kernel: the code around it is transformers' and verl's, the kernel real or a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

Kernel = Callable[..., torch.Tensor]
"""(tokens, heads, head_dim) of queries, keys and values, and the number of sequences -> the output of the queries."""


def real_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    """flash-attn where it is installed, else torch's own flash kernel; sequences of equal length."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        batch = [x.view(sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)
    longest = q.shape[0] // sequences
    ends = torch.arange(0, q.shape[0] + 1, longest, dtype=torch.int32, device=q.device)
    result: torch.Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    return result


def packed(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    """Attend over one pack; flattens as ``_prepare_from_posids`` of transformers does."""
    flat = [x.contiguous().view(-1, x.size(-2), x.size(-1)) for x in (q, k, v)]
    out = kernel(*flat, sequences)
    return out.view(q.size(0), -1, out.size(-2), out.size(-1))


def unpadded(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    """Attend over a padded batch: transformers takes the padding out and puts it back. Every row counts as full."""
    from transformers.modeling_flash_attention_utils import _index_first_axis, _pad_input

    valid = torch.arange(q.shape[0] * q.shape[1], device=q.device)
    out = kernel(*(_index_first_axis(x, valid) for x in (q, k, v)), sequences)
    result: torch.Tensor = _pad_input(out, valid, q.shape[0], q.shape[1])
    return result


def interface(kernel: Kernel, *, sequences: int, ulysses: int, padded: bool) -> Callable[..., Any]:
    """Return the function that transformers calls for attention."""

    def attend(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> torch.Tensor:
        return (unpadded if padded else packed)(kernel, q, k, v, sequences)

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if "cu_seq_lens_q" in more:  # a vision tower: the sequences are the images, or windows of them
            flat = (x.reshape(-1, x.size(-2), x.size(-1)) for x in (q, k, v))
            return kernel(*flat, 1).unsqueeze(0), None
        if ulysses == 1:
            return attend(q, k, v), None
        import verl.models.transformers.monkey_patch as verl_attention

        with mock.patch.object(verl_attention, "_flash_attention_forward", attend):
            attention = verl_attention._ulysses_flash_attention_forward
            return attention(q, k, v, mask, q.shape[1], position_ids=position_ids), None

    return forward

"""How a model reaches the attention kernel: the code around it is transformers' and verl's, the kernel a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from tracer.kernels import FlashAttention


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    """Attend over one pack; flattens as ``_prepare_from_posids`` of transformers does."""
    flat = [x.contiguous().view(-1, x.size(-2), x.size(-1)) for x in (q, k, v)]
    out: torch.Tensor = FlashAttention.apply(*flat, sequences)
    return out.view(q.size(0), -1, out.size(-2), out.size(-1))


def unpadded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    """Attend over a padded batch: transformers takes the padding out and puts it back. Every row counts as full."""
    from transformers.modeling_flash_attention_utils import _index_first_axis, _pad_input

    valid = torch.arange(q.shape[0] * q.shape[1], device=q.device)
    out = FlashAttention.apply(*(_index_first_axis(x, valid) for x in (q, k, v)), sequences)
    result: torch.Tensor = _pad_input(out, valid, q.shape[0], q.shape[1])
    return result


def interface(*, sequences: int, ulysses: int, padded: bool) -> Callable[..., Any]:
    """Return the function that transformers calls for attention."""

    def attend(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> torch.Tensor:
        return (unpadded if padded else packed)(q, k, v, sequences)

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, position_ids: Any = None, **_: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if ulysses == 1:
            return attend(q, k, v), None
        import verl.models.transformers.monkey_patch as verl_attention

        with mock.patch.object(verl_attention, "_flash_attention_forward", attend):
            attention = verl_attention._ulysses_flash_attention_forward
            return attention(q, k, v, mask, q.shape[1], position_ids=position_ids), None

    return forward

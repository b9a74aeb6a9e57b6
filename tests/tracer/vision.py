"""Images in a trace: verl's forward functions for vision-language models, and what depends on data that is not there."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tracer.attention import Kernel, packed
from tracer.case import Case
from tracer.models import SHAPES

PARTS = ("Model", "TextModel", "ForConditionalGeneration", "Attention")
"""Classes of a family whose methods verl replaces."""


def tower(case: Case) -> dict[str, Any]:
    """Return the configuration of the vision tower; empty for a text model."""
    return dict(SHAPES[case.model].get("vision_config", {}))


def patches(case: Case) -> int:
    """Return the patches of the pack's images: the merger makes one token of 2 x 2."""
    return 4 * case.image_tokens


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Return the pixels of the pack's images, as the processor hands them over: fp32, a row for each patch."""
    if not case.image_tokens:
        return {}
    size = 16 if SHAPES[case.model]["model_type"].startswith("qwen3") else 14
    return {
        "pixel_values": torch.empty(patches(case), 3 * 2 * size * size),
        "image_grid_thw": torch.zeros(1, 3, dtype=torch.int64),
    }


def input_ids(ids: torch.Tensor, case: Case) -> torch.Tensor:
    """Return the ids of a pack with the images in front, and nowhere else; of the whole group, which embeds before it shares."""
    if case.ulysses > 1:
        ids = torch.zeros(ids.shape[0], case.tokens, dtype=ids.dtype)
    image = SHAPES[case.model].get("image_token_id", 151655)
    ids.clamp_(max=image - 1)
    ids[0, : case.image_tokens] = image
    return ids


def position_ids(ids: torch.Tensor) -> torch.Tensor:
    """Return the positions of a pack: text, time, height and width for each token."""
    return torch.arange(ids.shape[1]).view(1, 1, -1).repeat(4, ids.shape[0], 1)


def _modules(case: Case) -> list[Any]:
    kind = SHAPES[case.model]["model_type"]
    kinds = {"qwen2_vl", "qwen2_5_vl"} if kind.startswith("qwen2") else {"qwen3_vl", "qwen3_vl_moe"}
    return [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in sorted(kinds)]


@contextlib.contextmanager
def installed(case: Case, kernel: Kernel) -> Iterator[None]:
    """Keep what verl replaces in a family's classes, and put a stand-in where the number of image tokens decides a shape."""
    import transformers.integrations.flash_attention as flash
    import verl.models.transformers.qwen2_vl as qwen2_vl

    with contextlib.ExitStack() as stack:
        for module in _modules(case):
            for owner in (
                value for name, value in vars(module).items() if name.endswith(PARTS) and _own(value, module)
            ):
                stack.enter_context(mock.patch.object(owner, "forward", owner.forward))
            for name, value in _stand_ins(case).items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
            for owner in [value for value in vars(module).values() if hasattr(value, "_deepstack_process")]:
                stack.enter_context(mock.patch.object(owner, "_deepstack_process", _deepstack))
            for owner in [value for value in vars(module).values() if hasattr(value, "rot_pos_emb")]:
                stack.enter_context(mock.patch.object(owner, "forward", _autocast(owner.forward, case)))
        stack.enter_context(mock.patch.object(torch.nn.LayerNorm, "forward", layer_norm))
        replaced = flash._flash_attention_forward
        stack.enter_context(mock.patch.object(flash, "_flash_attention_forward", replaced))

        def attend(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> torch.Tensor:
            return packed(kernel, q, k, v, case.sequences)

        stack.enter_context(mock.patch.object(qwen2_vl, "_custom_flash_attention_forward", attend))
        stack.enter_context(mock.patch.object(qwen2_vl, "_flash_use_top_left_mask", False, create=True))
        for owner in (FakeTensor, torch.Tensor):
            stack.enter_context(mock.patch.object(owner, "item", _item(case), create=True))
        yield


def _own(value: Any, module: Any) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _stand_ins(case: Case) -> dict[str, Any]:
    """What transformers computes from the grids of the images, on the host: indices and the ends of the windows."""
    rows = patches(case) or 16
    ends = torch.tensor([0, rows], dtype=torch.int32)
    return {
        "is_flash_attention_requested": lambda *_, **__: True,
        "get_vision_cu_seqlens": lambda *_, **__: ends.clone(),
        "get_vision_position_ids": lambda *_, **__: torch.zeros(rows, 2, dtype=torch.int64),
        "get_vision_window_index": lambda *_, **__: (torch.arange(rows // 4), ends.clone()),
        "get_vision_bilinear_indices_and_weights": lambda *_, **__: (
            torch.zeros(4, rows, dtype=torch.int64),
            torch.empty(4, rows),
        ),
    }


def _autocast(forward: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """Run a tower as verl runs the whole model, under autocast: the CPU's has the products, CUDA's the norms as well."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.compute_dtype == "bf16"):
            return forward(*args, **kwargs)

    return inside


def layer_norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Return the norm as CUDA's autocast computes it, in fp32. Source: aten/src/ATen/autocast_mode.h, AT_FORALL_FP32."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return torch.nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def _item(case: Case) -> Any:
    """The number of image tokens, which verl counts on the device, is the one of the case."""
    original = torch.Tensor.item

    def item(tensor: torch.Tensor) -> Any:
        return case.image_tokens if tensor.dtype == torch.int64 else original(tensor)

    return item


def _deepstack(_: Any, hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Source: ``Qwen3VLTextModel._deepstack_process``; a mask of the same number of tokens would have no shape here."""
    rows = torch.zeros(features.shape[0], dtype=torch.int64)
    columns = torch.arange(features.shape[0])
    hidden = hidden.clone()
    hidden[rows, columns, :] = hidden[rows, columns, :] + features.to(hidden.dtype)
    return hidden


def patch(model: Any, case: Case) -> None:
    """Let verl replace the family's methods, as it does when it builds the model."""
    from verl.models.transformers.monkey_patch import apply_monkey_patch

    with contextlib.redirect_stdout(None):
        apply_monkey_patch(
            model,
            ulysses_sp_size=case.ulysses,
            use_remove_padding=not case.padded,
            use_fused_kernels=case.fused != "none",
            fused_kernels_backend=case.fused,
        )
    if case.frozen_vision:
        model.model.visual.requires_grad_(False)

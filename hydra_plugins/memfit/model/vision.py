"""Vision towers: parameters, projector included, and what their activations depend on.

Symbols: h width of the tower, f of its feed-forward block.

Shapes were read from the model classes of transformers 5.10 and are compared with them in
``tests/test_model_against_transformers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict

from hydra_plugins.memfit.model.families import Tower
from hydra_plugins.memfit.model.spec import VisionSpec
from hydra_plugins.memfit.model.values import Values

Site = tuple[int, int, int]


def _linear(fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + fan_out


def _patches(values: Values, channels_key: str, width: int, *, bias: bool = True) -> int:
    area = values.size("patch_size") ** 2 * values.size(channels_key)
    return area * width + (width if bias else 0)


def _channels(values: Values) -> str:
    """Qwen's files say ``in_chans``, their classes ``in_channels``."""
    return "in_chans" if "in_chans" in values.given else "in_channels"


def _attention(h: int) -> int:
    return _linear(h, 3 * h) + _linear(h, h)


def _merged(values: Values, h: int) -> int:
    return h * values.size("spatial_merge_size") ** 2


def _qwen2(values: Values, text: Values) -> int:
    return _total(_qwen2_spec(values))


def _qwen2_5(values: Values, text: Values) -> int:
    return _total(_qwen2_5_spec(values))


def _qwen3(values: Values, text: Values) -> int:
    return _total(_qwen3_spec(values))


def _qwen3_5(values: Values, text: Values) -> int:
    return _total(_qwen3_5_spec(values))


def _total(spec: VisionSpec) -> int:
    return spec.root_parameters + spec.num_layers * spec.layer_parameters


def _qwen2_spec(values: Values) -> VisionSpec:
    h = values.size("embed_dim")
    f = int(h * values.number("mlp_ratio"))
    wide = _merged(values, h)
    merger = 2 * h + _linear(wide, wide) + _linear(wide, values.size("hidden_size"))
    return VisionSpec(
        **_sizes(values, h, f),
        lora_sites=(*_block_sites(values, h, f), (wide, wide, 1), (wide, values.size("hidden_size"), 1)),
        feed_forward="quick_gelu",
        rms_norm=False,
        layer_parameters=4 * h + _attention(h) + _linear(h, f) + _linear(f, h),
        root_parameters=_pixels(values) * h + merger,
    )


def _qwen2_5_spec(values: Values) -> VisionSpec:
    h, f = values.size("hidden_size"), values.size("intermediate_size")
    wide = _merged(values, h)
    merger = h + _linear(wide, wide) + _linear(wide, values.size("out_hidden_size"))
    return VisionSpec(
        **_sizes(values, h, f),
        lora_sites=(*_block_sites(values, h, f, up=2), (wide, wide, 1), (wide, values.size("out_hidden_size"), 1)),
        feed_forward="gated",
        rms_norm=True,
        layer_parameters=2 * h + _attention(h) + 2 * _linear(h, f) + _linear(f, h),
        root_parameters=_pixels(values) * h + merger,
    )


def _qwen3_5_spec(values: Values) -> VisionSpec:
    h, f = values.size("hidden_size"), values.size("intermediate_size")
    positions = values.size("num_position_embeddings") * h
    return VisionSpec(
        **_sizes(values, h, f),
        lora_sites=(*_block_sites(values, h, f), *_qwen3_merger_sites(values, h, 1)),
        feed_forward="gelu",
        rms_norm=False,
        learned_positions=True,
        layer_parameters=4 * h + _attention(h) + _linear(h, f) + _linear(f, h),
        root_parameters=_linear(_pixels(values), h) + positions + 2 * h + _qwen3_merger(values, h),
    )


def _qwen3_merger(values: Values, h: int) -> int:
    return sum(_linear(fan_in, fan_out) for fan_in, fan_out, _ in _qwen3_merger_sites(values, h, 1))


def _qwen3_merger_sites(values: Values, h: int, count: int) -> tuple[Site, ...]:
    wide = _merged(values, h)
    return (wide, wide, count), (wide, values.size("out_hidden_size"), count)


def _qwen3_spec(values: Values) -> VisionSpec:
    """The tower of Qwen3.5 and a merger, with a norm of its own, for each block whose output is used early."""
    plain, h = _qwen3_5_spec(values), values.size("hidden_size")
    mergers = len(values.items("deepstack_visual_indexes") or ())
    more = mergers * (2 * _merged(values, h) + _qwen3_merger(values, h))
    sites = (*_block_sites(values, h, plain.intermediate_size), *_qwen3_merger_sites(values, h, 1 + mergers))
    return replace(plain, num_deepstack=mergers, root_parameters=plain.root_parameters + more, lora_sites=sites)


def _block_sites(values: Values, h: int, f: int, *, up: int = 1) -> tuple[Site, ...]:
    """qkv, projection, ``up`` inputs of the feed-forward part and its output, of all blocks."""
    blocks = values.size("depth")
    return (h, 3 * h, blocks), (h, h, blocks), (h, f, up * blocks), (f, h, blocks)


class _Sizes(TypedDict):
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    pixels: int
    patches_per_token: int


def _sizes(values: Values, h: int, f: int) -> _Sizes:
    return {
        "hidden_size": h,
        "intermediate_size": f,
        "num_layers": values.size("depth"),
        "num_attention_heads": values.size("num_heads"),
        "pixels": _pixels(values),
        "patches_per_token": values.size("spatial_merge_size") ** 2,
    }


def _pixels(values: Values) -> int:
    return values.size("patch_size") ** 2 * values.size(_channels(values)) * values.size("temporal_patch_size")


def _siglip(values: Values, text: Values) -> int:
    h, f = values.size("hidden_size"), values.size("intermediate_size")
    feed_forward = _linear(h, f) + _linear(f, h)
    positions = (values.size("image_size") // values.size("patch_size")) ** 2 * h
    head = h + _attention(h) + 2 * h + feed_forward if values.flag("vision_use_head") else 0
    tower = values.size("num_hidden_layers") * (4 * h + _attention(h) + feed_forward) + 2 * h + head
    projector = h * text.size("hidden_size") + h
    return _patches(values, "num_channels", h) + positions + tower + projector


def _pixtral(values: Values, text: Values) -> int:
    h, f, out = values.size("hidden_size"), values.size("intermediate_size"), text.size("hidden_size")
    block = 4 * h * h + 3 * h * f + 2 * h
    merge = 4 * h * h + h
    tower = _patches(values, "num_channels", h, bias=False) + h + values.size("num_hidden_layers") * block
    return tower + merge + h * out + out * out


_TOWERS: dict[Tower, Callable[[Values, Values], int]] = {
    "qwen2": _qwen2,
    "qwen2_5": _qwen2_5,
    "qwen3": _qwen3,
    "qwen3_5": _qwen3_5,
    "siglip": _siglip,
    "pixtral": _pixtral,
}


def vision_parameters(tower: Tower, values: Values, text: Values) -> int:
    """Return the parameters of the tower and of what projects its output into the text model."""
    return _TOWERS[tower](values, text)


_MODELLED: dict[Tower, Callable[[Values], VisionSpec]] = {
    "qwen2": _qwen2_spec,
    "qwen2_5": _qwen2_5_spec,
    "qwen3": _qwen3_spec,
    "qwen3_5": _qwen3_5_spec,
}


def vision_spec(tower: Tower, values: Values) -> VisionSpec | None:
    """Return what the tower's activations depend on; ``None`` for a tower whose activations are not modelled."""
    read = _MODELLED.get(tower)
    return read(values) if read else None

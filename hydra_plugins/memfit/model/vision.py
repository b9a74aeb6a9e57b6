"""Parameters of the vision towers, projector included. Symbols: h width of the tower, f of its feed-forward block.

Shapes were read from the model classes of transformers 5.10 and are compared with them in
``tests/test_model_against_transformers.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from hydra_plugins.memfit.model.families import Tower
from hydra_plugins.memfit.model.values import Values


def _linear(fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + fan_out


def _patches(values: Values, channels_key: str, width: int, *, frames: int = 1, bias: bool = True) -> int:
    area = values.size("patch_size") ** 2 * values.size(channels_key) * frames
    return area * width + (width if bias else 0)


def _channels(values: Values) -> str:
    """Qwen's files say ``in_chans``, their classes ``in_channels``."""
    return "in_chans" if "in_chans" in values.given else "in_channels"


def _attention(h: int) -> int:
    return _linear(h, 3 * h) + _linear(h, h)


def _merged(values: Values, h: int) -> int:
    return h * values.size("spatial_merge_size") ** 2


def _qwen2(values: Values, text: Values) -> int:
    h, frames = values.size("embed_dim"), values.size("temporal_patch_size")
    f = int(h * values.number("mlp_ratio"))
    block = 4 * h + _attention(h) + _linear(h, f) + _linear(f, h)
    wide = _merged(values, h)
    merger = 2 * h + _linear(wide, wide) + _linear(wide, values.size("hidden_size"))
    return _patches(values, _channels(values), h, frames=frames, bias=False) + values.size("depth") * block + merger


def _qwen2_5(values: Values, text: Values) -> int:
    h, f, frames = (values.size(key) for key in ("hidden_size", "intermediate_size", "temporal_patch_size"))
    block = 2 * h + _attention(h) + 2 * _linear(h, f) + _linear(f, h)
    wide = _merged(values, h)
    merger = h + _linear(wide, wide) + _linear(wide, values.size("out_hidden_size"))
    return _patches(values, _channels(values), h, frames=frames, bias=False) + values.size("depth") * block + merger


def _qwen3(values: Values, text: Values) -> int:
    h = _merged(values, values.size("hidden_size"))
    merger = 2 * h + _linear(h, h) + _linear(h, values.size("out_hidden_size"))
    return _qwen3_5(values, text) + len(values.items("deepstack_visual_indexes") or ()) * merger


def _qwen3_5(values: Values, text: Values) -> int:
    h, f, frames = (values.size(key) for key in ("hidden_size", "intermediate_size", "temporal_patch_size"))
    block = 4 * h + _attention(h) + _linear(h, f) + _linear(f, h)
    wide = _merged(values, h)
    merger = _linear(wide, wide) + _linear(wide, values.size("out_hidden_size"))
    positions = values.size("num_position_embeddings") * h
    patches = _patches(values, _channels(values), h, frames=frames)
    return patches + positions + values.size("depth") * block + 2 * h + merger


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

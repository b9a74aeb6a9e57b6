"""A small Llama-like decoder as pure functions of a tree of arrays."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


def read_config(folder: str) -> dict[str, Any]:
    """Return config.json of a model directory."""
    content: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return content


def init(config: dict[str, Any], key: jax.Array) -> Tree:
    """Return fp32 parameters, layers stacked along their first axis."""
    d, f, n = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    keys = iter(jax.random.split(key, len(shapes) + 1))
    layers = {name: jax.random.normal(next(keys), (n, *shape)) * shape[0] ** -0.5 for name, shape in shapes.items()}
    layers |= {name: jnp.ones((n, d)) for name in ("norm1", "norm2")}
    return {
        "embed": jax.random.normal(next(keys), (config["vocab_size"], d)) * 0.02,
        "layers": layers,
        "norm": jnp.ones(d),
    }


def logits(params: Tree, tokens: jax.Array, config: dict[str, Any]) -> jax.Array:
    """Return logits of every position; each layer is recomputed in the backward pass."""
    x = params["embed"].astype(jnp.bfloat16)[tokens]
    layer = jax.checkpoint(partial(_layer, config=config))
    x, _ = jax.lax.scan(lambda h, p: (layer(h, p), None), x, params["layers"])
    return _norm(x, params["norm"]) @ params["embed"].T.astype(jnp.bfloat16)


def _layer(x: jax.Array, p: Tree, config: dict[str, Any]) -> jax.Array:
    h = _norm(x, p["norm1"])
    x = x + _attend(h, p, config) @ p["o"].astype(x.dtype)
    h = _norm(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"].astype(x.dtype)) * (h @ p["up"].astype(x.dtype))) @ p["down"].astype(x.dtype)


def _attend(h: jax.Array, p: Tree, config: dict[str, Any]) -> jax.Array:
    batch, length, width = h.shape
    size = width // config["num_attention_heads"]
    q, k, v = (_rotate((h @ p[name].astype(h.dtype)).reshape(batch, length, -1, size), name != "v") for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width)


def _rotate(x: jax.Array, wanted: bool) -> jax.Array:
    if not wanted:
        return x
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None].astype(x.dtype), jnp.sin(angle)[:, None].astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)

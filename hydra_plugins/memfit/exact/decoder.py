"""The decoder that MLLM-JAX trains, as pure functions of a tree of arrays. Imports jax: only the compile child loads this.

What decides the memory is kept as the runner has it: fp32 parameters cast to bf16 at each use, RMSNorm and the rotary
angles in fp32, key and value heads repeated before attention, splash attention where the shapes allow it and an fp32
score matrix elsewhere, a Python loop over layers (no scan).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, PartitionSpec

from hydra_plugins.memfit.exact.spec import Architecture

Tree = Mapping[str, Any]
SPLASH_BLOCK = 128
"""Query length and head size must be multiples of it for the Pallas kernel."""
MASKED = -1e37
_HEADS = PartitionSpec(("dp", "fsdp"), "tp", None, None)


def shapes(arch: Architecture) -> dict[str, Any]:
    """Return the tree of fp32 parameter shapes."""
    d, f = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim

    def leaf(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    def layer() -> dict[str, Any]:
        return {
            "q_proj": {"kernel": leaf(d, q), "bias": leaf(q)},
            "k_proj": {"kernel": leaf(d, kv), "bias": leaf(kv)},
            "v_proj": {"kernel": leaf(d, kv), "bias": leaf(kv)},
            "o_proj": {"kernel": leaf(q, d)},
            "gate_proj": {"kernel": leaf(d, f)},
            "up_proj": {"kernel": leaf(d, f)},
            "down_proj": {"kernel": leaf(f, d)},
            "input_norm": {"scale": leaf(d)},
            "post_norm": {"scale": leaf(d)},
        }

    trunk = {"embedding": leaf(arch.vocab_size, d), "norm": {"scale": leaf(d)}}
    trunk |= {f"layers_{i}": layer() for i in range(arch.num_hidden_layers)}
    return {"model": trunk} if arch.tied else {"model": trunk, "lm_head": {"kernel": leaf(d, arch.vocab_size)}}


def partition(path: tuple[str, ...]) -> PartitionSpec:
    """Return how the runner shards the parameter at ``path`` over the mesh (dp, fsdp, tp)."""
    if path[-1] in ("bias", "scale"):
        return PartitionSpec()
    transposed = path[-2] in ("o_proj", "gate_proj", "up_proj")
    return PartitionSpec("tp", "fsdp") if transposed else PartitionSpec("fsdp", "tp")


class Decoder:
    """The forward pass for one architecture on one mesh."""

    def __init__(self, arch: Architecture, mesh: Mesh, *, checkpoint_layers: bool) -> None:
        self.arch, self.mesh, self.checkpoint_layers = arch, mesh, checkpoint_layers

    def logits(self, params: Tree, tokens: Any, positions: Any, visible: Any, cache: Any = None) -> tuple[Any, Any]:
        """Return bf16 logits of every position, and the filled cache where one was given."""
        trunk = self._trunk if self.checkpoint_layers else jax.checkpoint(self._trunk)
        hidden, cache = trunk(params["model"], tokens, positions, visible, cache)
        head = {"kernel": params["model"]["embedding"].T} if self.arch.tied else params["lm_head"]
        return jax.checkpoint(_dense)(head, hidden), cache

    def _trunk(self, params: Tree, tokens: Any, positions: Any, visible: Any, cache: Any) -> tuple[Any, Any]:
        x = params["embedding"].astype(jnp.bfloat16)[tokens]
        turn = _rotary(positions, self.arch.head_dim)
        layer = jax.checkpoint(self._layer) if self.checkpoint_layers else self._layer
        filled = {}
        for i in range(self.arch.num_hidden_layers):
            name = f"layers_{i}"
            x, filled[name] = layer(params[name], x, turn, visible, None if cache is None else cache[name])
        return _norm(params["norm"], x), None if cache is None else filled

    def _layer(self, params: Tree, x: Any, turn: Any, visible: Any, cache: Any) -> tuple[Any, Any]:
        attended, cache = self._attention(params, _norm(params["input_norm"], x), turn, visible, cache)
        x = x + attended
        h = _norm(params["post_norm"], x)
        gated = jax.nn.silu(_dense(params["gate_proj"], h)) * _dense(params["up_proj"], h)
        return x + _dense(params["down_proj"], gated), cache

    def _attention(self, params: Tree, h: Any, turn: Any, visible: Any, cache: Any) -> tuple[Any, Any]:
        q, k, v = (self._split(_dense(params[f"{n}_proj"], h)) for n in "qkv")
        q = _rotate(q.astype(jnp.float32), turn).astype(jnp.bfloat16)
        k = _rotate(k, turn).astype(jnp.bfloat16)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(cache[n], x, (0, 0, cache["end"][0], 0)) for n, x in (("k", k), ("v", v))
            )
            cache = {"k": k, "v": v, "end": cache["end"] + h.shape[1]}
        out = self._weigh(q, self._repeat(k), self._repeat(v), visible)
        batch, _, length, _ = out.shape
        return _dense(params["o_proj"], out.transpose(0, 2, 1, 3).reshape(batch, length, -1)), cache

    def _weigh(self, q: Any, k: Any, v: Any, visible: Any) -> Any:
        scaled = q / math.sqrt(self.arch.head_dim)
        if q.shape[2] % SPLASH_BLOCK == 0 and self.arch.head_dim % SPLASH_BLOCK == 0:
            run = jax.shard_map(_splash, mesh=self.mesh, in_specs=(_HEADS,) * 3, out_specs=_HEADS, check_vma=False)
            return run(scaled, k, v).astype(jnp.bfloat16)
        scores = jnp.einsum("bhqd,bhkd->bhqk", scaled.astype(jnp.float32), k.astype(jnp.float32)) + visible
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v.astype(jnp.float32)).astype(
            jnp.bfloat16
        )

    def _split(self, x: Any) -> Any:
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.arch.head_dim).transpose(0, 2, 1, 3)

    def _repeat(self, x: Any) -> Any:
        batch, heads, length, size = x.shape
        group = self.arch.num_attention_heads // heads
        spread = jnp.broadcast_to(x[:, :, None], (batch, heads, group, length, size))
        return spread.reshape(batch, heads * group, length, size)


def _splash(q: Any, k: Any, v: Any) -> Any:
    causal = splash_attention_mask.CausalMask(shape=(q.shape[2], k.shape[2]))
    mask = splash_attention_mask.MultiHeadMask(masks=(causal,) * q.shape[1])
    kernel = splash_attention_kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)(q, k, v)


def _dense(params: Tree, x: Any) -> Any:
    y = x @ params["kernel"].astype(jnp.bfloat16)
    return y + params["bias"].astype(jnp.bfloat16) if "bias" in params else y


def _norm(params: Tree, x: Any) -> Any:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * params["scale"]).astype(x.dtype)


def _rotary(positions: Any, head_dim: int) -> tuple[Any, Any]:
    frequency = 1e6 ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate((angle, angle), axis=-1)[:, None]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Any, turn: tuple[Any, Any]) -> Any:
    cos, sin = turn
    half = x.shape[-1] // 2
    return x * cos + jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin

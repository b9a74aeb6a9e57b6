"""The parts of one decoder layer: every linear module, and everything else that has parameters.

Symbols: h hidden_size, a num_attention_heads, k num_key_value_heads, d head_dim, f width of the feed-forward block.
Shapes were read from the model classes of transformers 5.10 (``modeling_<model_type>.py``) and are compared with them
in ``tests/test_model_against_transformers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.model.families import Attention, Experts, Family, Mlp
from hydra_plugins.memfit.model.values import Values


@dataclass(frozen=True, slots=True)
class Linear:
    """``count`` equal linear modules; sizes in features."""

    fan_in: int
    fan_out: int
    bias: bool = False
    count: int = 1

    @property
    def parameters(self) -> int:
        """Weights and biases of all ``count`` modules."""
        return self.count * (self.fan_in * self.fan_out + (self.fan_out if self.bias else 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Attention or feed-forward block of one layer."""

    linears: tuple[Linear, ...]
    other: int = 0
    """Parameters that are not in ``linears`` nor in ``experts``: norms, routers, sinks, convolutions."""
    experts: tuple[Linear, ...] = ()
    """The routed experts, as linear modules."""
    expert_other: int = 0
    """Biases of fused experts."""
    router: Linear | None = None
    """The router, where only older classes have it as a linear module; its parameters are in ``other``."""

    @property
    def expert_parameters(self) -> int:
        """Parameters of the routed experts."""
        return sum(one.parameters for one in self.experts) + self.expert_other

    @property
    def parameters(self) -> int:
        """All parameters of the block."""
        return sum(one.parameters for one in self.linears) + self.other + self.expert_parameters


def head_dim(values: Values) -> int:
    """Return the width of one head: given, else hidden_size // num_attention_heads."""
    h, a = values.size("hidden_size"), values.size("num_attention_heads")
    d = values.optional("head_dim") or h // a
    if not d:
        raise ModelNotFound(f"{values.owner}: {a} num_attention_heads do not fit into a hidden_size of {h}.")
    return d


def num_key_value_heads(values: Values) -> int:
    """Return the number of key/value heads: given, else as many as query heads."""
    return values.optional("num_key_value_heads") or values.size("num_attention_heads")


def softmax_attention(values: Values, attention: Attention) -> Block:
    """Return attention over the whole sequence or a window of it."""
    return _latent(values, attention) if attention.mla else _grouped(values, attention)


def _grouped(values: Values, attention: Attention) -> Block:
    h, d = values.size("hidden_size"), head_dim(values)
    q, kv = values.size("num_attention_heads") * d, num_key_value_heads(values) * d
    bias, wide = values.flag(attention.qkv_bias), q * (2 if attention.output_gate else 1)
    out = Linear(q, h, values.flag(attention.out_bias))
    if attention.packed:
        inputs: tuple[Linear, ...] = (Linear(h, wide + 2 * kv, bias),)
    else:
        inputs = (Linear(h, wide, bias), Linear(h, kv, bias, 2))
    sinks = values.size("num_attention_heads") if attention.sinks else 0
    return Block(linears=(*inputs, out), other=sinks + _qk_norm(values, attention, q + kv, d))


def _qk_norm(values: Values, attention: Attention, channels: int, d: int) -> int:
    if not attention.qk_norm or not values.flag(attention.qk_norm_key):
        return 0
    return 2 * d if attention.qk_norm == "head" else channels


def _latent(values: Values, attention: Attention) -> Block:
    """DeepSeek-V2 (arXiv:2405.04434, section 2.1): q and kv through low-rank projections, each with a norm."""
    h, a = values.size("hidden_size"), values.size("num_attention_heads")
    q_rank, kv_rank = values.count("q_lora_rank"), values.size("kv_lora_rank")
    nope, rope, v = (values.size(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    bias, q = values.flag(attention.qkv_bias), a * (nope + rope)
    queries = (Linear(h, q_rank, bias), Linear(q_rank, q)) if q_rank else (Linear(h, q),)
    keys = (Linear(h, kv_rank + rope, bias), Linear(kv_rank, a * (nope + v)))
    return Block(linears=(*queries, *keys, Linear(a * v, h, values.flag(attention.out_bias))), other=q_rank + kv_rank)


def delta_net(values: Values, packing: Literal["packed", "split"]) -> Block:
    """Return a gated delta net (Qwen3-Next, Qwen3.5): a recurrent state in place of a KV cache."""
    h, heads = values.size("hidden_size"), values.size("linear_num_value_heads")
    key = values.size("linear_num_key_heads") * values.size("linear_key_head_dim")
    value = heads * values.size("linear_value_head_dim")
    qkv, kernel = 2 * key + value, values.size("linear_conv_kernel_dim")
    packed = (Linear(h, qkv + value), Linear(h, 2 * heads))
    split = (Linear(h, qkv), Linear(h, value), Linear(h, heads, False, 2))
    other = qkv * kernel + 2 * heads + values.size("linear_value_head_dim")
    return Block(linears=((packed if packing == "packed" else split) + (Linear(value, h),)), other=other)


def feed_forward(values: Values, mlp: Mlp, width: int) -> Block:
    """Return the block of a dense layer."""
    h, bias = values.size("hidden_size"), values.flag(mlp.bias)
    if mlp.packed:
        up: tuple[Linear, ...] = (Linear(h, 2 * width, bias),)
    else:
        up = (Linear(h, width, bias, 2 if mlp.gated else 1),)
    return Block(linears=(*up, Linear(width, h, bias)), other=mlp.activation_parameters)


def shared_expert_width(values: Values, experts: Experts) -> int:
    """Return the width of the shared expert, 0 without one."""
    if experts.shared_width_key:
        return values.count(experts.shared_width_key)
    return values.count(experts.shared_count_key) * values.size(experts.width_key) if experts.shared_count_key else 0


def mixture(values: Values, family: Family, experts: Experts) -> Block:
    """Return the block of a mixture-of-experts layer: routed experts, router, shared expert."""
    h, width, number = (values.size(key) for key in ("hidden_size", experts.width_key, experts.count_key))
    gate = (Linear(h, 1),) if experts.shared_width_key else ()
    shared = shared_expert_width(values, experts)
    linears = gate + (feed_forward(values, family.mlp, shared).linears if shared else ())
    router = Linear(h, number, experts.bias)
    return Block(
        linears=(*linears, router) if experts.linear_router else linears,
        other=0 if experts.linear_router else router.parameters,
        experts=(Linear(h, width, count=2 * number), Linear(width, h, count=number)),
        expert_other=number * (2 * width + h) if experts.bias else 0,
        router=None if experts.linear_router else router,
    )

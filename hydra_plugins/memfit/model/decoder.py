"""The decoder layers of one model: which kinds of layers there are, how many of each, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.model.families import Family
from hydra_plugins.memfit.model.layers import Block, Linear, delta_net, feed_forward, mixture, softmax_attention
from hydra_plugins.memfit.model.values import Values

MAX_LAYERS = 10_000
"""Beyond any model; keeps a nonsensical config.json from filling the memory."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder layers: which kinds there are, and how often."""

    family: Family
    values: Values

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The kinds of blocks that the layers are made of."""
        family, values = self.family, self.values
        found = {"full": softmax_attention(values, family.attention)}
        if family.linear_attention:
            found["linear"] = delta_net(values, family.linear_attention)
        if "dense" in {kind for _, kind in self.layers}:
            found["dense"] = feed_forward(values, family.mlp, values.size("intermediate_size"))
        if family.experts and values.count(family.experts.count_key):
            found["mixture"] = mixture(values, family, family.experts)
        return found

    @cached_property
    def attention(self) -> list[str]:
        """The attention of each layer, in the words of ``layer_types``."""
        return attention_kinds(self.values, self.family)

    def has_attention(self, kind: str) -> bool:
        """Whether any layer has this attention."""
        return kind in self.attention

    @property
    def num_full_attention_layers(self) -> int | None:
        """Layers whose cache grows with the whole sequence; None: all."""
        full = self.attention.count("full_attention")
        return None if full == len(self.attention) else full

    @cached_property
    def layers(self) -> Counter[tuple[str, str]]:
        """How many layers have which attention and which feed-forward block."""
        moe = moe_layers(self.values, self.family)
        return Counter(
            ("linear" if kind == "linear_attention" else "full", "mixture" if i in moe else "dense")
            for i, kind in enumerate(self.attention)
        )

    @property
    def norms(self) -> int:
        """Parameters of the norms over the hidden size in one layer."""
        norms = self.family.norms
        return norms.per_layer * norms.vectors * self.values.size("hidden_size")

    def count(self, kind: str) -> int:
        """How many layers have this kind of block."""
        return sum(number for kinds, number in self.layers.items() if kind in kinds)

    def layer_parameters(self) -> dict[tuple[str, str], int]:
        """Parameters of one layer of each kind."""
        return {kinds: self.norms + sum(self.blocks[kind].parameters for kind in kinds) for kinds in self.layers}

    def linears(self) -> Iterable[Linear]:
        """All linear modules outside the routed experts."""
        for kind, block in self.blocks.items():
            for one in block.linears:
                yield Linear(one.fan_in, one.fan_out, one.bias, one.count * self.count(kind))

    def expert_linears(self) -> Iterable[Linear]:
        """Routers and routed experts, for the classes that have them as linear modules."""
        experts, block = self.family.experts, self.blocks.get("mixture")
        if experts is None or block is None or experts.always_fused:
            return
        for one in (*block.experts, *([block.router] if block.router else [])):
            yield Linear(one.fan_in, one.fan_out, one.bias, one.count * self.count("mixture"))


def attention_kinds(values: Values, family: Family) -> list[str]:
    """Return one of full_attention, sliding_attention, linear_attention for each layer."""
    number, given = values.size("num_hidden_layers"), values.items("layer_types")
    if number > MAX_LAYERS:
        raise ModelNotFound(f"{values.owner}: num_hidden_layers is {number}; no model has more than {MAX_LAYERS}.")
    if given is not None and (family.window != "never" or family.linear_attention):
        if len(given) < number:
            raise ModelNotFound(f"{values.owner}: layer_types names {len(given)} layers, num_hidden_layers {number}.")
        return [_known_kind(values, family, kind) for kind in given[:number]]
    if family.linear_attention:
        return _every(values.size("full_attention_interval"), number, "linear_attention")
    if not values.count("sliding_window"):
        return ["full_attention"] * number
    if family.window == "pattern":
        pattern = values.get("sliding_window_pattern")
        period = len(pattern) if isinstance(pattern, str) else values.count("sliding_window_pattern")
        return _every(period, number, "sliding_attention")
    if family.window == "switch":
        first = values.count("max_window_layers") if values.flag("use_sliding_window") else number
        return ["full_attention" if i < first else "sliding_attention" for i in range(number)]
    return ["sliding_attention" if family.window == "always" else "full_attention"] * number


def _known_kind(values: Values, family: Family, kind: object) -> str:
    known = ["full_attention", "linear_attention" if family.linear_attention else "sliding_attention"]
    if kind not in known:
        raise ModelNotFound(f"{values.owner}: layer_types has {kind!r}, which {family.architecture} has not ({known}).")
    return str(kind)


def _every(period: int, number: int, others: str) -> list[str]:
    return ["full_attention" if period and (i + 1) % period == 0 else others for i in range(number)]


def moe_layers(values: Values, family: Family) -> set[int]:
    """Return the layers that have routed experts."""
    experts, number = family.experts, values.size("num_hidden_layers")
    if experts is None or not values.count(experts.count_key):
        return set()
    if experts.depth == "first_dense":
        return set(range(values.count("first_k_dense_replace"), number))
    if experts.depth == "sparse_step":
        step, dense = values.size("decoder_sparse_step"), values.items("mlp_only_layers") or ()
        return {i for i in range(number) if (i + 1) % step == 0 and i not in dense}
    return set(range(number))

"""Model states of one rank under Megatron-Core: tensor, pipeline, context and expert parallelism, distributed optimizer.

A rank holds the bf16 parameters of its pipeline stage, divided by TP (routed experts by EP · ETP), and fp32 main gradients
of all of them in one contiguous buffer. The distributed optimizer spreads the fp32 master copy and both moments over the
data-parallel ranks; context-parallel ranks belong to them.

Symbols: P_d parameters of the stage outside routed experts, P_e those of routed experts, both on one rank; D and D_e the
ranks that share one copy of their optimizer states.

    weights 2 (P_d + P_e)     gradients 4 (P_d + P_e)     optimizer 12 P_d / D + 12 P_e / D_e

Sources: Megatron-LM ``theoretical_memory_usage.py`` (18, or 6 + 12 / DP bytes a parameter), megatron-core 0.16.1
``distributed/param_and_grad_buffer.py``, ``optimizer/distrib_optimizer.py``, ``parallel_state.py``,
``transformer/transformer_layer.py`` (``get_transformer_layer_offset``, uneven stages).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.model.spec import ModelSpec

PARAMETER_BYTES = 2
MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one model is spread over the GPUs of the trainer."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Model chunks of one pipeline rank (interleaved schedule); 1: none."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = True
    """Norms and residuals are divided among the tensor-parallel ranks too."""
    distributed_optimizer: bool = True

    @property
    def data(self) -> int:
        """Data-parallel ranks: what a batch is shared out among."""
        return max(1, self.world // (self.tensor * self.pipeline * self.context))

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that share the optimizer states of parameters outside experts."""
        return self.data * self.context if self.distributed_optimizer else 1

    @property
    def expert_optimizer_ranks(self) -> int:
        """Ranks that share the optimizer states of routed experts."""
        if not self.distributed_optimizer:
            return 1
        return max(1, self.world // (self.expert_tensor * self.expert * self.pipeline))

    @property
    def residual(self) -> int:
        """What divides norms and residuals: TP under sequence parallelism."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The part of the model on one pipeline rank."""

    index: int
    layers: int
    moe_layers: int
    first: bool
    """It has the embedding."""
    last: bool
    """It has the last norm and the head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How Megatron is told to cut the layers into stages."""

    first: int | None = None
    """``num_layers_in_first_pipeline_stage``."""
    last: int | None = None
    embedding_counts: bool = False
    """``account_for_embedding_in_pipeline_split``: the embedding takes the place of a layer."""
    loss_counts: bool = False


def layer_counts(layers: int, pipeline: int, split: Split) -> tuple[int, ...]:
    """
    Return the decoder layers of each stage; raises `ConfigError` where they cannot be dealt out evenly.

    >>> layer_counts(94, 8, Split(embedding_counts=True, loss_counts=True))
    (11, 12, 12, 12, 12, 12, 12, 11)
    """
    if pipeline == 1:
        return (layers,)
    ends = (split.first, split.last)
    middle = pipeline - sum(end is not None for end in ends)
    rest = layers - sum(end or 0 for end in ends) + split.embedding_counts + split.loss_counts
    if rest < 0 or (middle and rest % middle) or (not middle and rest):
        raise ConfigError(
            f"{layers} layers cannot be dealt out among {pipeline} pipeline stages: Megatron wants equal stages. Choose a "
            "pipeline_model_parallel_size that divides the layers, or set num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage in override_transformer_config."
        )
    counts = [rest // middle if middle else 0] * pipeline
    if split.first is not None:
        counts[0] = split.first
    if split.last is not None:
        counts[-1] = split.last
    counts[0] -= split.embedding_counts
    counts[-1] -= split.loss_counts
    return tuple(counts)


def stages(model: ModelSpec, layout: Layout, split: Split) -> tuple[Stage, ...]:
    """Return the stages of the pipeline; dense layers of a mixture of experts come first, as DeepSeek's do."""
    counts = layer_counts(model.num_hidden_layers, layout.pipeline, split)
    dense = model.num_hidden_layers - model.num_moe_layers
    found, before = [], 0
    for index, layers in enumerate(counts):
        plain = min(layers, max(0, dense - before)) if model.num_experts else layers
        found.append(
            Stage(
                index=index,
                layers=layers,
                moe_layers=layers - plain,
                first=index == 0,
                last=index == layout.pipeline - 1,
            )
        )
        before += layers
    return tuple(found)


def worst_stages(found: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """
    Return the stages that can be the worst: the first two (most micro-batches in flight), the largest, and the last.

    The stages between hold fewer micro-batches of as many layers.
    """
    largest = max(found, key=lambda stage: (stage.moe_layers, stage.layers, -stage.index))
    return tuple(dict.fromkeys((*found[:2], largest, found[-1])))


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Parameters on one rank."""

    dense: int
    """Outside routed experts."""
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def held(model: ModelSpec, layout: Layout, stage: Stage, *, vocabulary_head: bool = True) -> Held:
    """
    Return the parameters of one rank of the stage.

    Norms, routers, and the low-rank projections of latent attention are on every tensor-parallel rank. A tied head on another
    stage than the embedding is a second copy. A vision tower is counted whole on the first stage.
    Leaves out: the vocabulary's padding to a multiple of TP · 128.
    """
    moe_layer = model.layer_parameters - _experts_per_layer(model)
    plain_layers = model.num_hidden_layers - model.num_moe_layers
    layers_total = model.parameters - model.root_parameters - model.vision_parameters
    plain = (layers_total - model.num_moe_layers * model.layer_parameters) // plain_layers if plain_layers else 0
    moe = stage.moe_layers if model.num_experts else 0
    dense = moe * _divided(moe_layer, _copied(model, moe=True), layout.tensor)
    dense += (stage.layers - moe) * _divided(plain, _copied(model, moe=False), layout.tensor)
    matrices = int(stage.first) + int(stage.last and vocabulary_head)
    if stage.first and stage.last and model.tie_word_embeddings:
        matrices = 1
    dense += matrices * ceil_div(model.embedding_parameters, layout.tensor)
    dense += model.hidden_size if stage.last else 0
    dense += model.hidden_size if stage.last and not vocabulary_head else 0
    dense += model.vision_parameters if stage.first else 0
    experts = ceil_div(moe * _experts_per_layer(model), layout.expert * layout.expert_tensor)
    return Held(dense=dense, experts=experts)


def _experts_per_layer(model: ModelSpec) -> int:
    return model.expert_parameters // model.num_moe_layers if model.num_moe_layers else 0


def _divided(parameters: int, copied: int, tensor: int) -> int:
    return ceil_div(parameters - copied, tensor) + copied


def _copied(model: ModelSpec, *, moe: bool) -> int:
    """Parameters of one layer that every tensor-parallel rank has in full."""
    h = model.hidden_size
    copied = 2 * h + (2 * model.head_dim if model.qk_norm else 0) + (h * model.num_experts if moe else 0)
    if model.kv_lora_rank:
        copied += h * (model.kv_lora_rank + model.qk_rope_head_dim + model.q_lora_rank)
    return copied


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """What Megatron's optimizer stores for a parameter, and where."""

    master_bytes: int = MASTER_BYTES
    moment_bytes: int = 8
    """Both moments together; less with a precision-aware optimizer in bf16 or fp8."""
    gradient_bytes: int = 4
    """Main gradients: 4 with ``grad_reduce_in_fp32``, else 2."""
    host_fraction: float = 0.0
    """Share of the parameters whose states live and are stepped on the host (``optimizer_cpu_offload``)."""

    def state_bytes(self, params: Held, layout: Layout, *, host: bool = False) -> int:
        """Return the states on the GPU (or those that always live on the host) of one rank, moments included."""
        return self._share(params, layout, self.master_bytes + self.moment_bytes, host)

    def master_copy_bytes(self, params: Held, layout: Layout) -> int:
        """Return the fp32 master copy alone: it exists before the first step, the moments do not."""
        return self._share(params, layout, self.master_bytes, host=False)

    def _share(self, params: Held, layout: Layout, each: int, host: bool) -> int:
        dense = ceil_div(each * params.dense, layout.optimizer_ranks)
        experts = ceil_div(each * params.experts, layout.expert_optimizer_ranks)
        part = self.host_fraction if host else 1 - self.host_fraction
        return int((dense + experts) * part) + (0 if part in (0, 1) else 1)

    def step_bytes(self, params: Held, layout: Layout) -> int:
        """Return what a step allocates: an fp32 copy of the rank's share of gradients that are not fp32 already."""
        if self.gradient_bytes >= MASTER_BYTES:
            return 0
        dense = ceil_div(4 * params.dense, layout.optimizer_ranks)
        return dense + ceil_div(4 * params.experts, layout.expert_optimizer_ranks)

"""Megatron's formulas: what a rank holds, how stages are cut, what is alive in the pipeline. Numbers are worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.megatron import (
    Layout,
    Optimizer,
    Split,
    Stage,
    held,
    layer_counts,
    stages,
    worst_stages,
)
from hydra_plugins.memfit.memory.megatron_layers import (
    Layer,
    Recompute,
    forward_bytes,
    in_flight,
    kept_bytes,
    update_moments_bytes,
)
from hydra_plugins.memfit.memory.megatron_pass import (
    StagePass,
    VocabularyHead,
    forward_moments,
    head_forward_bytes,
    head_update_bytes,
    update_moments,
)
from hydra_plugins.memfit.memory.trainer import peak
from hydra_plugins.memfit.memory.weight_sync import exported_bytes
from hydra_plugins.memfit.model.resolve import load

MOE, DENSE, TIED, LATENT = "qwen3-30b-a3b", "qwen2.5-7b", "qwen2.5-3b", "deepseek-v3"
FULL = Recompute(granularity="full")


def whole(name: str, **sizes: Any) -> tuple[Any, Layout]:
    """Return a model and a layout of 64 GPUs."""
    return load(name), Layout(**{"world": 64, **sizes})


@pytest.mark.parametrize("name", [MOE, DENSE, TIED, LATENT])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_all_ranks_together_hold_the_model(name: str, pipeline: int) -> None:
    """Without tensor or expert parallelism the stages add up to the model; a tied head on its own stage is a second copy."""
    model, layout = whole(name, pipeline=pipeline)
    split = Split(last=model.num_hidden_layers // 2)
    found = stages(model, layout, split if pipeline == 2 else Split())
    total = sum(held(model, layout, stage).total for stage in found)

    twice = model.embedding_parameters if model.tie_word_embeddings and pipeline > 1 else 0
    assert total == pytest.approx(model.parameters + twice, rel=1e-5)


@pytest.mark.parametrize(("name", "tensor", "expert"), [(DENSE, 4, 1), (MOE, 4, 8), (TIED, 2, 1)])
def test_parallel_ranks_share_the_model(name: str, tensor: int, expert: int) -> None:
    """TP divides all but norms and routers, EP and ETP the experts: one rank has its part and a little more."""
    model, layout = whole(name, tensor=tensor, expert=expert, expert_tensor=1)
    mine = held(model, layout, stages(model, layout, Split())[0])

    assert mine.experts == -(-model.expert_parameters // expert)
    dense = model.parameters - model.expert_parameters
    assert dense / tensor <= mine.dense <= dense / tensor * 1.03


def test_the_distributed_optimizer_is_6_and_12_over_dp() -> None:
    """Megatron's published sum: 18 bytes a parameter, or 6 + 12 / DP with the distributed optimizer; CP ranks count as DP."""
    model, layout = whole(DENSE, tensor=4, context=2)
    mine = held(model, layout, stages(model, layout, Split())[0])
    states = Optimizer().state_bytes(mine, layout)

    assert layout.data == 8
    assert states == -(-12 * mine.dense // 16)
    assert Optimizer().state_bytes(mine, replace(layout, distributed_optimizer=False)) == 12 * mine.dense
    assert Optimizer().master_copy_bytes(mine, layout) == -(-4 * mine.dense // 16)


def test_experts_have_their_own_data_parallel_ranks() -> None:
    """Experts of EP 8 on 64 GPUs have 8 copies, whatever TP is; ETP makes fewer."""
    _, layout = whole(MOE, tensor=4, expert=8, expert_tensor=1)

    assert (layout.optimizer_ranks, layout.expert_optimizer_ranks) == (16, 8)
    assert replace(layout, expert_tensor=4).expert_optimizer_ranks == 2


def test_an_optimizer_on_the_host_leaves_the_gpu() -> None:
    """A fraction of the states lives on the host for good, the rest on the GPU, and nothing is lost."""
    model, layout = whole(DENSE, tensor=4)
    mine = held(model, layout, stages(model, layout, Split())[0])
    everything = Optimizer().state_bytes(mine, layout)
    half = Optimizer(host_fraction=0.5)

    assert Optimizer(host_fraction=1.0).state_bytes(mine, layout) == 0
    assert half.state_bytes(mine, layout) + half.state_bytes(mine, layout, host=True) == pytest.approx(
        everything, abs=2
    )


def test_bf16_gradients_are_widened_for_the_step() -> None:
    """Main gradients in fp32 are stepped as they are; bf16 ones get an fp32 copy of the rank's share."""
    model, layout = whole(DENSE, tensor=4)
    mine = held(model, layout, stages(model, layout, Split())[0])

    assert Optimizer().step_bytes(mine, layout) == 0
    assert Optimizer(gradient_bytes=2).step_bytes(mine, layout) == -(-4 * mine.dense // layout.optimizer_ranks)


@pytest.mark.parametrize(
    ("layers", "pipeline", "split", "counts"),
    [
        (28, 4, Split(), (7, 7, 7, 7)),
        (61, 12, Split(last=6), (5,) * 11 + (6,)),
        (94, 8, Split(embedding_counts=True, loss_counts=True), (11, *(12,) * 6, 11)),
        (30, 4, Split(first=6, last=8), (6, 8, 8, 8)),
        (5, 2, Split(first=2, last=3), (2, 3)),
    ],
)
def test_stages_are_cut_as_megatron_cuts_them(
    layers: int, pipeline: int, split: Split, counts: tuple[int, ...]
) -> None:
    """Equal stages, or the first and the last as told, or embedding and loss in place of a layer."""
    assert layer_counts(layers, pipeline, split) == counts
    assert sum(counts) == layers


@pytest.mark.parametrize(
    ("layers", "pipeline", "split"), [(28, 3, Split()), (28, 4, Split(last=3)), (5, 2, Split(first=2, last=2))]
)
def test_stages_that_cannot_be_equal_are_refused(layers: int, pipeline: int, split: Split) -> None:
    """The message names the keys that make unequal stages."""
    with pytest.raises(ConfigError, match="num_layers_in_last_pipeline_stage"):
        layer_counts(layers, pipeline, split)


def test_dense_layers_come_first() -> None:
    """DeepSeek-V3's three dense layers are in the first stage, which has fewer experts."""
    model, layout = whole(LATENT, pipeline=12, world=96)
    found = stages(model, layout, Split(last=6))

    assert [stage.moe_layers for stage in found[:2]] == [2, 5]
    assert sum(stage.moe_layers for stage in found) == 58
    assert [stage.index for stage in worst_stages(found)] == [0, 1, 11]


def test_what_a_layer_keeps_is_the_published_sum() -> None:
    """Qwen2.5-7B without TP: norms, the projection and its rotated copies, the output, log-sum-exp, gate, up and product."""
    model, layout = whole(DENSE)
    h, m, q, k, heads = 3584, 18944, 3584, 512, 28

    kept = kept_bytes(Layer.of(model, layout, moe=False))
    assert kept == 8 * h + 8 + 2 * (q + 2 * k + q + k + q) + 4 * heads + 6 * m


def test_what_an_expert_layer_keeps() -> None:
    """Qwen3-30B-A3B, 8 of 128 experts: each row's input, gate, up and product, and where it goes; variances of 32 + 4 heads."""
    model, layout = whole(MOE, expert=8)
    h, m, q, k, heads = 2048, 768, 4096, 512, 36

    attention = 2 * (q + 2 * k + q + k + q) + 4 * 32 + 2 * (q + k) + 4 * heads
    kept = kept_bytes(Layer.of(model, layout, moe=True))
    assert kept == 8 * h + 8 + attention + 8 * (2 * h + 6 * m + 28) + 10 * 128


@pytest.mark.parametrize(("expert", "expert_tensor", "copies"), [(1, 1, 8), (8, 1, 16), (8, 2, 8 + 8 + 16)])
def test_rows_on_their_way_to_experts(expert: int, expert_tensor: int, copies: int) -> None:
    """A rank holds the 8 rows a token that it sends, those that it receives, and those that expert-tensor ranks gather."""
    model, layout = whole(MOE, expert=expert, expert_tensor=expert_tensor)
    layer = Layer.of(model, layout, moe=True, imbalance=1.0)
    building = update_moments_bytes(layer)[0]

    assert layer.moving_rows == copies
    assert building == (2 * 2048 + 2 * 2048 * copies + 4 * 2048 * layer.rows, 0)
    assert max(beside for beside, _ in update_moments_bytes(layer)) == building[0]


def test_a_dense_layers_backward_pass() -> None:
    """Beside the residual's gradient: fc2's input and matrix, gate and up, or fc1's input and matrices with gate and up used up."""
    model, layout = whole(DENSE)
    h, m = 3584, 18944

    assert update_moments_bytes(Layer.of(model, layout, moe=False)) == (
        (2 * h + 2 * m, 1),
        (2 * h + 4 * m, 0),
        (4 * h - 2 * m, 2),
    )


def test_the_busiest_rank_decides_one_layer() -> None:
    """Half as many rows again weigh on the layer at work, not on what all layers keep."""
    model, layout = whole(MOE, expert=8)
    even, uneven = (Layer.of(model, layout, moe=True, imbalance=share) for share in (1.0, 1.5))

    assert kept_bytes(even) == kept_bytes(uneven)
    assert kept_bytes(uneven, busiest=True) > kept_bytes(even, busiest=True)
    assert forward_bytes(uneven) > 1.3 * forward_bytes(even)


def test_korthikanti_without_dropout() -> None:
    """34 bytes of a GPT layer are 32 here: one mask of attention's and one of the MLP's dropout are not there."""
    gpt = replace(
        load(DENSE),
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    kept = kept_bytes(Layer.of(gpt, Layout(world=1), moe=False))
    rotated, log_sum_exp, variances = 4 * 1024, 4 * 16, 8  # copies of q and k, flash attention, two norms
    gate = 2 * 4096  # SwiGLU has two matrices for GELU's one

    assert kept - rotated - log_sum_exp - variances - gate == 32 * 1024


def test_sequence_parallel_divides_everything() -> None:
    """With it TP 4 keeps a quarter of a layer; without it norms stay whole."""
    model, layout = whole(DENSE, tensor=4)
    one = kept_bytes(Layer.of(model, whole(DENSE)[1], moe=False))

    assert kept_bytes(Layer.of(model, layout, moe=False)) == pytest.approx(one / 4, abs=8)
    plain = kept_bytes(Layer.of(model, replace(layout, sequence_parallel=False), moe=False))
    assert plain == pytest.approx(one / 4 + 8 * 3584 * 3 / 4, abs=8)


@pytest.mark.parametrize("module", ["layernorm", "mlp"])
def test_selective_recomputation_drops_what_it_names(module: str) -> None:
    """The norm's outputs (4h of 8h), or the MLP's 6m."""
    model, layout = whole(DENSE)
    layer = Layer.of(model, layout, moe=False)
    dropped = {"layernorm": 4 * 3584, "mlp": 6 * 18944}[module]
    recompute = Recompute(granularity="selective", modules=frozenset({module}))

    assert kept_bytes(layer) - kept_bytes(layer, recompute) == dropped


def test_recomputing_latent_projections_keeps_the_output() -> None:
    """DeepSeek-V3's q, k and v come back from their compressed form; what the output projection reads stays."""
    model, layout = whole(LATENT)
    layer = Layer.of(model, layout, moe=True)
    recompute = Recompute(granularity="selective", modules=frozenset({"mla_up_proj"}))
    q, v = 128 * 192, 128 * 128

    assert layer.output == v
    assert kept_bytes(layer) - kept_bytes(layer, recompute) == 2 * (q + q + 128 * (128 + 128))


@pytest.mark.parametrize(
    ("pipeline", "virtual", "index", "micro_batches", "alive"),
    [
        (1, 1, 0, 8, 1.0),
        (4, 1, 0, 16, 4.0),
        (4, 1, 3, 16, 1.0),
        (4, 1, 0, 2, 2.0),
        (4, 2, 0, 16, 5.5),
        (4, 2, 3, 16, 2.5),
    ],
)
def test_micro_batches_in_flight(pipeline: int, virtual: int, index: int, micro_batches: int, alive: float) -> None:
    """1F1B holds PP - i of them on stage i, never more than there are; the interleaved schedule holds more."""
    layout = Layout(world=64, pipeline=pipeline, virtual=virtual)
    stage = Stage(index=index, layers=8, moe_layers=0, first=index == 0, last=index == pipeline - 1)

    assert in_flight(layout, stage, micro_batches=micro_batches) == alive


def a_pass(name: str = DENSE, index: int = 0, **changes: Any) -> StagePass:
    """Return the pass of one stage of TP 4 x PP 4 over 16384 tokens."""
    model, layout = whole(name, tensor=4, pipeline=4, expert=8 if name == MOE else 1)
    stage = stages(model, layout, Split())[index]
    return StagePass(
        **{"model": model, "layout": layout, "stage": stage, "tokens": 16384, "micro_batches": 16, **changes}
    )


def total(moments: Any) -> int:
    """The peak of a pass in bytes."""
    return peak(moments).total_bytes


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_recomputation_lowers_an_update(name: str) -> None:
    """Full recomputation keeps one input a layer; block recomputation of some layers is between."""
    block = Recompute(granularity="full", method="block", layers=3)
    sizes = [total(update_moments(a_pass(name, recompute=r))) for r in (Recompute(), block, FULL)]

    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[0] / 3


def test_an_embeddings_gradient_is_the_end_of_a_backward_pass() -> None:
    """A small batch on the first stage peaks where the gradient of the whole vocabulary is written: 2E over TP 4."""
    small = a_pass(tokens=64, recompute=FULL)

    assert peak(update_moments(small)).gradients == 2 * small.columns * small.model.hidden_size


def test_the_first_stage_keeps_most_and_the_last_has_the_logits() -> None:
    """Activations follow the micro-batches in flight; only the last stage computes log-probabilities."""
    first, last = (peak(update_moments(a_pass(index=i))) for i in (0, 3))

    assert first.activations > 3 * last.activations
    assert first.logits == 0
    assert total(forward_moments(a_pass(index=3))) > total(forward_moments(a_pass(index=0)))


@pytest.mark.parametrize(
    ("head", "forward", "update"),
    [
        (VocabularyHead(), 6, 8),
        (VocabularyHead(scaled=False, copied=False), 6, 6),
        (VocabularyHead(entropy="whole"), 12, 12),
        (VocabularyHead(entropy="whole", scaled=False, copied=False), 8, 8),
        (VocabularyHead(entropy="chunks", chunk_tokens=512), 8 + 4 * 512 / 4096, 16),
    ],
)
def test_bytes_per_token_and_column(head: VocabularyHead, forward: float, update: float) -> None:
    """Each variant of the head, as docs/memory-model.md lists it."""
    sizes = {"tokens": 4096, "vocabulary": 1000, "hidden": 64}

    assert head_forward_bytes(head, **sizes) == forward * 4096 * 1000
    assert head_update_bytes(head, **sizes) == update * 4096 * 1000


def test_fused_and_value_heads_have_no_matrix_of_logits() -> None:
    """A fused head needs a small part of what the plain one does; a value head nearly nothing."""
    sizes = {"tokens": 16384, "vocabulary": 152064, "hidden": 3584}
    plain = head_update_bytes(VocabularyHead(), **sizes)

    assert head_update_bytes(VocabularyHead(fused=True), **sizes) < plain / 4
    assert head_update_bytes(VocabularyHead(vocabulary=False), **sizes) < GIB / 100


@given(tokens=st.integers(1, 1 << 17), tensor=st.sampled_from([1, 2, 4]), index=st.integers(0, 3))
def test_more_tokens_never_need_less(tokens: int, tensor: int, index: int) -> None:
    """The planner counts on it: fewer tokens or more tensor-parallel ranks never raise a peak."""
    model = load(DENSE)
    layout = Layout(world=64, tensor=tensor, pipeline=4)
    stage = stages(model, layout, Split())[index]
    one = StagePass(model=model, layout=layout, stage=stage, tokens=tokens, micro_batches=4)

    assert total(update_moments(one)) <= total(update_moments(replace(one, tokens=tokens + 1)))
    wider = replace(one, layout=replace(layout, tensor=2 * tensor))
    assert total(update_moments(wider)) <= total(update_moments(one)) + 6 * model.hidden_size * tokens


def test_forward_workspace_is_that_of_one_layer() -> None:
    """Without gradients a layer's MLP beside its residual: 4h + 6m."""
    model, layout = whole(DENSE)

    assert forward_bytes(Layer.of(model, layout, moe=False)) == 4 * 3584 + 6 * 18944


def test_handing_over_gathers_one_tensor() -> None:
    """The shards of the largest tensor and their whole, in bf16; nothing to gather on one rank."""
    model = load(DENSE)

    assert exported_bytes(model, tensor_parallel=1, pipeline=1) == 0
    assert exported_bytes(model, tensor_parallel=1, pipeline=2) == 2 * model.embedding_parameters
    assert exported_bytes(model, tensor_parallel=4, pipeline=1) == 4 * model.embedding_parameters

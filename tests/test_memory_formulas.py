"""The formulas: their own examples, published anchors, and what must hold for every input."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.breakdown import (
    PHASES,
    Estimate,
    HostEstimate,
    MemoryBreakdown,
    PhaseEstimate,
    Shortfall,
)
from hydra_plugins.memfit.memory.engine import (
    Engine,
    minimum_kv_bytes,
    pool,
    useful_kv_bytes,
    weight_bytes,
    workspace_bytes,
)
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head, forward_logits_bytes, update_logits_bytes
from hydra_plugins.memfit.memory.kv_cache import kv_bytes_per_token
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.planning.colocated import Role

VOCABULARY = 151936


@pytest.mark.parametrize("module", ["base.units", "memory.states", "memory.generation"])
def test_the_examples_in_the_docstrings_hold(module: str):
    """Each formula's doctest is a number that can be checked by hand."""
    assert doctest.testmod(importlib.import_module(f"hydra_plugins.memfit.{module}")).failed == 0


def test_one_fp32_copy_of_the_logits_is_what_verl_issue_2828_failed_to_allocate():
    """verl issue 2828: "Tried to allocate 13.91 GiB" in entropy_from_logits is T x V x 4 for 24576 tokens of 151936."""
    assert pytest.approx(13.91, abs=0.005) == 4 * 24576 * VOCABULARY / GIB
    eager, off = Head(entropy="eager"), Head()
    extra = forward_logits_bytes(eager, tokens=24576, vocabulary=VOCABULARY, hidden=5120) - forward_logits_bytes(
        off, tokens=24576, vocabulary=VOCABULARY, hidden=5120
    )
    assert extra == 3 * 4 * 24576 * VOCABULARY  # the fp32 softmax, its product with the logits, and an fp32 cast


def role(model: str, *, tokens: int, entropy: str, scaled: str = "copy", ranks: int = 1) -> Role:
    """An actor with verl's defaults."""
    spec = load(model)
    head = Head(entropy=entropy, scaled=scaled)
    return Role(
        model=spec,
        sharding=Sharding(
            version=1,
            ranks=ranks,
            layer=spec.layer_parameters,
            root=spec.root_parameters,
            embedding=spec.embedding_parameters,
            layers=spec.num_hidden_layers,
            tied=spec.tie_word_embeddings,
        ),
        trainable_parameters=spec.parameters,
        forward_head=head,
        update_head=head,
        forward_tokens=tokens,
        update_tokens=tokens,
    )


def test_the_3b_anchor():
    """Qwen2.5-3B, 18432 tokens, eager entropy, temperature not 1, one rank: 76.2 GiB (log-prob) and 116.6 GiB (update)."""
    actor = role("qwen2.5-3b", tokens=18432, entropy="eager")
    states = actor.loaded(optimizer=True).total_bytes
    assert (states + actor.forward_pass().total_bytes) / GIB == pytest.approx(76.2, abs=0.1)
    assert (states + actor.update_pass().total_bytes) / GIB == pytest.approx(116.6, abs=0.1)


@pytest.mark.parametrize(
    ("model", "per_token"),
    [
        ("qwen2.5-7b", 2 * 28 * 4 * 128 * 2),
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
    ],
)
def test_kv_bytes_per_token(model: str, per_token: int):
    """Grouped-query attention: 2 L K D b; latent attention: L (kv_lora_rank + rope) b."""
    assert kv_bytes_per_token(load(model)) == per_token


def test_deepseek_latent_cache_is_not_divided_by_tensor_parallelism():
    """Every rank holds the whole latent; ordinary heads are divided, but never below one."""
    assert kv_bytes_per_token(load("deepseek-v3"), tensor_parallel=8) == kv_bytes_per_token(load("deepseek-v3"))
    small = load("qwen2.5-3b")
    assert kv_bytes_per_token(small, tensor_parallel=8) * small.num_key_value_heads == kv_bytes_per_token(small)


def engine(share_of: str, fraction: float | None = 0.5) -> Engine:
    """A 7B engine."""
    return Engine(
        model=load("qwen2.5-7b"),
        share_of=share_of,
        fraction=fraction,
        tensor_parallel=1,
        max_model_len=4096,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        concurrent_sequences=64,
        tokens_per_sequence=2048,
        graphs=True,
    )


def test_the_four_meanings_of_an_engines_fraction():
    """The same 0.5 of 80 GiB gives less and less KV: of its own use, with graphs, of what is free, of everything."""
    capacity, trainer = 80 * GIB, 20 * GIB
    kv = {
        s: pool(engine(s), capacity=capacity, trainer_at_launch=trainer).kv_bytes(0.5)
        for s in ("own", "own_with_graphs", "free", "device")
    }
    assert kv["own"] > kv["own_with_graphs"] > kv["device"]
    assert kv["own"] - kv["device"] > 0.95 * trainer  # less the engine's own context, which the process shares
    free = pool(engine("free"), capacity=capacity, trainer_at_launch=trainer)
    assert free.base < capacity - trainer and free.inside == weight_bytes(engine("free"))


@pytest.mark.parametrize(("sequences", "score"), [(1024, 38), (128, 38), (127, 50), (1, 38)])
def test_a_sampler_that_sorts_needs_its_scratch(sequences: int, score: int):
    """vLLM 0.11: so many bytes a score beside the hidden states, unless the forward pass needs more; later ones add the two."""
    small = replace(engine("own"), max_num_seqs=sequences, max_num_batched_tokens=1024)
    model, body = small.model, 1024 * (4 * small.model.hidden_size + 6 * small.model.intermediate_size)

    scores = 2 * 1024 * model.hidden_size + score * sequences * model.vocab_size
    assert workspace_bytes(small) == max(body, scores)
    assert workspace_bytes(replace(small, share_of="free")) == body + 12 * sequences * model.vocab_size


def test_useful_kv_is_never_below_what_the_engine_insists_on():
    """One sequence of max_model_len, or every sequence in flight."""
    assert useful_kv_bytes(engine("own")) == 64 * 2048 * kv_bytes_per_token(load("qwen2.5-7b"))
    assert minimum_kv_bytes(engine("own")) == 4096 * kv_bytes_per_token(load("qwen2.5-7b"))


HEADS = st.builds(
    Head,
    entropy=st.sampled_from(["none", "compiled", "eager", "chunked"]),
    entropy_checkpointing=st.booleans(),
    fused=st.sampled_from(["none", "torch", "triton"]),
    scaled=st.sampled_from(["no", "copy", "in_place"]),
    log_prob=st.sampled_from(["flash_ce", "torch"]),
)


@given(head=HEADS, tokens=st.integers(1, 200_000), more=st.integers(0, 50_000))
def test_more_tokens_never_need_less(head: Head, tokens: int, more: int):
    """Every variant of the head grows with the tokens, and its update needs at least what its forward pass needs."""
    for bytes_of in (forward_logits_bytes, update_logits_bytes):
        smaller = bytes_of(head, tokens=tokens, vocabulary=VOCABULARY, hidden=2048)
        assert smaller <= bytes_of(head, tokens=tokens + more, vocabulary=VOCABULARY, hidden=2048)


@given(ranks=st.integers(1, 64), tokens=st.integers(256, 65536), version=st.sampled_from([1, 2]))
def test_more_ranks_never_need_more_states(ranks: int, tokens: int, version: int):
    """Sharding over more ranks never raises parameters, gradients or optimizer states of a rank."""
    one, more = (
        role("qwen2.5-3b", tokens=tokens, entropy="none", ranks=ranks),
        role("qwen2.5-3b", tokens=tokens, entropy="none", ranks=ranks + 1),
    )
    assert more.parameter_bytes <= one.parameter_bytes
    assert more.step().total_bytes <= one.step().total_bytes
    assert more.moment_bytes <= one.moment_bytes


def phase(name: str, peak: int, budget: int = 100) -> PhaseEstimate:
    """A phase with a peak."""
    return PhaseEstimate(name=name, trainer=MemoryBreakdown(weights=peak), budget_bytes=budget)


def test_the_binding_phase_is_where_the_run_would_die():
    """The first phase of a step that does not fit, else the one with the least headroom."""
    assert (
        Estimate(phases=(phase("old_log_prob", 101), phase("update_actor", 500))).binding_phase.name == "old_log_prob"
    )
    assert Estimate(phases=(phase("old_log_prob", 50), phase("update_actor", 99))).binding_phase.name == "update_actor"
    assert Estimate(phases=(phase("rollout", 120), phase("update_actor", 110))).binding_phase.name == "update_actor"


def test_an_estimate_fits_exactly_when_nothing_is_violated():
    """Phases, host and shortfalls all count; an unknown host budget does not refuse."""
    good = Estimate(phases=(phase("rollout", 100),), host=HostEstimate(peak_bytes=10**15, budget_bytes=0))
    assert good.fits and good.violation_bytes == 0
    for bad in (
        Estimate(phases=(phase("rollout", 101),)),
        Estimate(phases=(phase("rollout", 1),), host=HostEstimate(peak_bytes=2, budget_bytes=1)),
        Estimate(phases=(phase("rollout", 1),), shortfalls=(Shortfall(phase="launch", num_bytes=0, why="too little"),)),
    ):
        assert not bad.fits and bad.violation_bytes > 0


def test_components_and_processes_sum_to_the_peak():
    """What a phase holds by kind and by process is the same total; an unknown phase is refused."""
    both = PhaseEstimate(
        name="rollout",
        trainer=MemoryBreakdown(weights=3, context=1),
        engine=MemoryBreakdown(kv_cache=5),
        budget_bytes=9,
    )
    assert both.peak_bytes == 9 == sum(both.components.as_dict().values()) and both.fits
    with pytest.raises(Exception, match="nap"):
        phase("nap", 1)
    assert len(set(PHASES)) == len(PHASES)

"""The formulas that AReaL adds, and the calendar of trainer and server at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.memory.breakdown import PhaseEstimate
from hydra_plugins.memfit.memory.engine import Engine, awake
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import (
    SLICE_TOKENS,
    Head,
    forward_logits_bytes,
    lm_head_logits_bytes,
    update_logits_bytes,
)
from hydra_plugins.memfit.memory.weight_sync import streamed_bytes, whole_tensor_bytes
from hydra_plugins.memfit.model.resolve import resolve_model
from hydra_plugins.memfit.planning.concurrent import APART, SHARED, TURNS, ConcurrentRun, estimate
from hydra_plugins.memfit.planning.roles import Role

GIB = 1 << 30
MODEL = resolve_model("Qwen/Qwen2.5-0.5B-Instruct", environ={})
HEAD = Head(entropy="slices", chunk_tokens=SLICE_TOKENS)


def sharding(ranks: int = 1) -> Sharding:
    """Return how the model is sharded over ``ranks``."""
    return Sharding(
        version=2,
        ranks=ranks,
        layer=MODEL.layer_parameters,
        root=MODEL.root_parameters,
        embedding=MODEL.embedding_parameters,
        layers=MODEL.num_hidden_layers,
        tied=MODEL.tie_word_embeddings,
    )


def role(*, tokens: int = 5120, master: int = 2, checkpointing: bool = False) -> Role:
    """Return a trained policy."""
    return Role(
        model=MODEL,
        sharding=sharding(),
        trainable_parameters=MODEL.parameters,
        master_bytes=master,
        step_copy=False,
        checkpointing=checkpointing,
        forward_head=HEAD,
        update_head=HEAD,
        forward_tokens=tokens,
        update_tokens=tokens,
    )


def engine(fraction: float = 0.8) -> Engine:
    """Return an SGLang server of the same model."""
    return Engine(
        model=MODEL,
        share_of="free",
        fraction=fraction,
        tensor_parallel=1,
        max_model_len=1024,
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        concurrent_sequences=128,
        tokens_per_sequence=1024,
        graphs=True,
        sleeps=False,
    )


def run(*, placement: str = SHARED, actor: Role | None = None, fraction: float = 0.8, held: int = 0) -> ConcurrentRun:
    """Return a launch on one GPU of 44.42 GiB."""
    capacity = int(44.42 * GIB)
    return ConcurrentRun(
        capacity_bytes=capacity,
        budget_bytes=int(capacity * 0.95) - held,
        held_bytes=held,
        placement=placement,
        server_first=True,
        trainers_per_node=1,
        servers_per_node=1,
        actor=actor or role(),
        engine=engine(fraction),
        sync="disk",
    )


# -- formulas -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "asked_gib"), [(5120, 1.45), (5019, 1.42)])
def test_logits_are_the_allocation_that_failed(tokens: int, asked_gib: float) -> None:
    """The out-of-memory messages of an RTX 5090 and an A100 name the allocation of one bf16 matrix of logits."""
    logits = lm_head_logits_bytes(HEAD, tokens=tokens, vocabulary=MODEL.vocab_size)

    assert logits / GIB == pytest.approx(asked_gib, abs=0.01)


@pytest.mark.parametrize("tokens", [256, 1024, 5120, 32768])
def test_the_loss_keeps_three_matrices_and_a_slice(tokens: int) -> None:
    """Update: the logits, two gradients of their size and one slice; without gradients two micro-batches' logits."""
    vocabulary = MODEL.vocab_size
    update = update_logits_bytes(HEAD, tokens=tokens, vocabulary=vocabulary, hidden=MODEL.hidden_size)
    forward = forward_logits_bytes(HEAD, tokens=tokens, vocabulary=vocabulary, hidden=MODEL.hidden_size)

    assert update == (6 * tokens + 2 * min(1024, tokens)) * vocabulary
    assert forward == 4 * tokens * vocabulary


def test_a_single_rank_gathers_nothing_to_save_its_weights() -> None:
    """One rank has whole tensors; several gather one at a time, and a stream keeps two buckets beside it."""
    assert whole_tensor_bytes(sharding(1), master_bytes=2) == 0
    tensor = whole_tensor_bytes(sharding(4), master_bytes=4)
    assert tensor == 4 * MODEL.embedding_parameters
    assert streamed_bytes(sharding(4), master_bytes=4, bucket_bytes=GIB) == 2 * GIB + tensor + tensor // 2


# -- the calendar ---------------------------------------------------------------------------------------------------
def phases(launch: ConcurrentRun) -> dict[str, PhaseEstimate]:
    """Return the phases by name."""
    return {phase.name: phase for phase in estimate(launch).phases}


def test_a_shared_server_is_resident_in_every_phase() -> None:
    """The server generates while the trainer trains: its whole share stands in each phase of a shared GPU."""
    launch = run()
    serving = {phase.engine.total_bytes for phase in estimate(launch).phases}

    assert len(serving) == 1
    assert serving.pop() / GIB == pytest.approx(36.34, rel=0.02)


def test_apart_no_gpu_holds_both() -> None:
    """On GPUs of their own the rollout has no trainer, and the trainer's phases have no server."""
    for phase in estimate(run(placement=APART)).phases:
        assert 0 in (phase.trainer.total_bytes, phase.engine.total_bytes)


def test_a_server_that_sleeps_leaves_the_gpu_to_the_trainer() -> None:
    """Taking turns with a sleeping server costs less than sharing; without sleep it saves the trainer's rest only."""
    awake_server = run(placement=TURNS)
    asleep = replace(awake_server, engine=replace(engine(), sleeps=True))

    assert phases(asleep)["update_actor"].engine.total_bytes < 2 * GIB
    assert phases(awake_server)["update_actor"].engine.total_bytes > 30 * GIB
    assert phases(asleep)["rollout"].trainer.total_bytes < phases(run())["rollout"].trainer.total_bytes


def test_what_strangers_hold_is_not_the_servers_to_share() -> None:
    """SGLang's share is of what is free: memory that others hold makes the pool smaller."""
    free, less = (phases(run(held=held))["rollout"].engine.total_bytes for held in (0, 10 * GIB))

    assert (free - less) / GIB == pytest.approx(8.0, abs=0.1)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 64).map(lambda n: 256 * n),
    master=st.sampled_from([2, 4]),
    checkpointing=st.booleans(),
    fraction=st.sampled_from([0.2, 0.5, 0.8, 0.9]),
    placement=st.sampled_from([APART, SHARED, TURNS]),
)
def test_phases_that_die_show_the_moment_and_say_the_need(
    tokens: int, master: int, checkpointing: bool, fraction: float, placement: str
) -> None:
    """A phase above the capacity stands between it and its need; any other needs what it shows."""
    launch = run(
        placement=placement, fraction=fraction, actor=role(tokens=tokens, master=master, checkpointing=checkpointing)
    )
    for phase in estimate(launch).phases:
        if phase.needed_bytes:
            assert launch.capacity_bytes < phase.peak_bytes <= phase.needed_bytes
            assert not phase.fits
        assert phase.fits == (phase.excess_bytes == 0)
        assert phase.peak_bytes == phase.components.total_bytes


@settings(max_examples=40)
@given(tokens=st.integers(1, 30).map(lambda n: 256 * n), fraction=st.sampled_from([0.3, 0.6, 0.85]))
def test_more_tokens_never_need_less(tokens: int, fraction: float) -> None:
    """The planner searches on the need: it never falls with the limit, nor with the server's share."""
    few, many, wider = (
        estimate(run(fraction=share, actor=role(tokens=size))).violation_bytes
        for share, size in ((fraction, tokens), (fraction, tokens + 256), (fraction + 0.05, tokens))
    )

    assert few <= many
    assert few <= wider


def test_the_engine_is_the_one_of_the_other_calendar() -> None:
    """Both calendars take the server from one place: awake, it is the same everywhere."""
    launch = run(placement=APART)
    rollout = phases(launch)["rollout"].engine

    assert rollout == awake(engine(), kv=rollout.kv_cache)

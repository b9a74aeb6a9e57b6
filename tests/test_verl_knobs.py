"""Knobs and keys of verl beyond the common ones: HSDP, the critic's own, padding to buckets, given pools, recurrent states."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from test_verl_read import ACTOR, MODEL, ROLLOUT, batch, estimate, problem

from hydra_plugins.memfit.base.errors import NotModelled
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.frameworks.verl.writable import WRITABLE_KEYS
from hydra_plugins.memfit.memory.kv_cache import paged_kv_bytes, state_bytes
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.planning.problem import Knob
from hydra_plugins.memfit.planning.search import make_plan

PPO = {"algorithm.adv_estimator": "gae"}
PARTS = "actor_rollout_ref"
DYNAMIC = {f"{ACTOR}.use_dynamic_bsz": True}
MICRO = {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1, f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 1}


def knob(key: str, values: dict[str, Any], **options: Any) -> Knob | None:
    """The knob of ``key``, if the launch has one."""
    return next((k for k in problem(values, **options).knobs if k.key == key), None)


@pytest.mark.parametrize(
    ("size", "gpus", "wider"),
    [(2, 8, (4, 8)), (4, 8, (8,)), (8, 8, None), (1, 8, (2, 4, 8)), (3, 12, (4, 6, 12))],
)
def test_hsdp_is_widened(size: int, gpus: int, wider: tuple[int, ...] | None) -> None:
    """A group of fewer GPUs than there are may grow, to sizes that divide them; a full group has nothing to give."""
    key = f"{ACTOR}.fsdp_config.fsdp_size"
    found = knob(key, {**MICRO, key: size, "trainer.n_gpus_per_node": gpus})

    assert (found.candidates if found else None) == wider


def test_a_plan_widens_hsdp_where_its_copies_do_not_fit() -> None:
    """7B in fp32 on groups of two GPUs needs 61 GiB of states; the plan shards them over more, not over the host."""
    key = f"{ACTOR}.fsdp_config.fsdp_size"
    plan = make_plan(problem({**MICRO, **DYNAMIC, key: 2}, hardware="l40s", version="0.9.1"))
    changed = {change.key: change.new for change in plan.changes}

    assert plan.fits
    assert changed[key] in (4, 8)


@pytest.mark.parametrize(
    ("version", "key"),
    [("0.6.1", "critic.ulysses_sequence_parallel_size"), ("0.9.1", "critic.fsdp.ulysses_sequence_parallel_size")],
)
def test_a_critic_has_ulysses_and_activation_offload(version: str, key: str) -> None:
    """Both are offered where the release reads them; with Ulysses the critic's budgets may fall below one sequence."""
    values = {**PPO, **MICRO, "critic.model.use_remove_padding": True, "critic.use_dynamic_bsz": True,
              "data.max_response_length": 7680}  # fmt: skip
    found = knob(key, values, version=version, model="qwen2.5-7b")
    budgets = found.companions(4) if found and found.companions else {}

    assert found is not None and found.candidates == (2, 4)
    assert set(budgets.values()) == {2048}
    assert all(name in WRITABLE_KEYS for name in (key, *budgets))
    assert knob("critic.model.enable_activation_offload", values, version=version) is not None


@pytest.mark.parametrize(
    ("pad_to", "sp", "tokens"),
    [(1, 1, 8 * 2000), (1024, 1, 16384), (1024, 2, 8192), (4096, 4, 4096)],
)
def test_packed_micro_batches_are_padded_to_buckets(pad_to: int, sp: int, tokens: int) -> None:
    """The whole packed sequence is rounded up, before it is shared out among the ranks of a sequence."""
    assert batch(max_length=2000, pad_to=pad_to, sequence_parallel=sp).tokens() == tokens


def test_pad_to_length_is_read_where_the_engine_reads_it() -> None:
    """0.9's fsdp_config has the switch and the bucket; a bucket above the budget raises the peak."""
    fsdp = f"{ACTOR}.fsdp_config"
    plain = estimate({**DYNAMIC, **MICRO})
    padded = estimate({**DYNAMIC, **MICRO, f"{fsdp}.pad_to_length": True, f"{fsdp}.pad_to_length_bucket": 65536})

    assert padded.phase("update_actor").peak_bytes > plain.phase("update_actor").peak_bytes
    assert padded.phase("old_log_prob").peak_bytes > plain.phase("old_log_prob").peak_bytes


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_pool_given_in_bytes_counts_instead_of_the_share(share: float) -> None:
    """vLLM's kv_cache_memory_bytes is the pool, whatever gpu_memory_utilization says."""
    given = {f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes": 7 * GIB}

    assert estimate({**MICRO, **given, f"{ROLLOUT}.gpu_memory_utilization": share}).phase(
        "rollout"
    ).components.kv_cache == (7 * GIB)


def test_linear_attention_keeps_a_state_for_each_sequence() -> None:
    """Qwen3-Next: 36 of 48 layers keep 32 heads of 128 x 128 in fp32 and 3 inputs of the convolution in bf16."""
    model = load("qwen3-next-80b-a3b")
    layer = 4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128)

    assert state_bytes(model) == 36 * layer
    assert state_bytes(model, tensor_parallel=4) == 36 * layer // 4
    assert state_bytes(load("qwen2.5-7b")) == 0
    stateless = replace(model, linear_num_key_heads=0, linear_num_value_heads=0)
    extra = paged_kv_bytes(model, tokens=4096, sequences=64) - paged_kv_bytes(stateless, tokens=4096, sequences=64)
    assert extra == 64 * 36 * layer


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({f"{ACTOR}.strategy": "veomni"}, f"{ACTOR}.strategy=veomni"),
        ({f"{ACTOR}.strategy": "torchtitan"}, f"{ACTOR}.strategy=torchtitan"),
        ({f"{MODEL}.mtp.enable": True}, f"{MODEL}.mtp.enable=true: multi-token prediction"),
    ],
)
def test_engines_and_modules_without_a_model_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    """The message names key and value, and the way on."""
    with pytest.raises(NotModelled, match=re.escape(says)) as caught:
        problem({**MICRO, **values}).estimate({})

    assert "memfit.strict=false" in str(caught.value)

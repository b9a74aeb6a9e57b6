"""What a second reading of verl found: residents, budgets and refusals that a first one misses."""

from __future__ import annotations

from typing import Any

import pytest
from test_verl_read import ACTOR, MODEL, ROLLOUT, batch, estimate, problem

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.settings import Lengths
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.planning.search import make_plan

DYNAMIC = {
    f"{ACTOR}.use_dynamic_bsz": True,
    f"{MODEL}.use_remove_padding": True,
    f"{ACTOR}.ppo_max_token_len_per_gpu": 8192,
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 8192,
}
LORA = {**DYNAMIC, f"{MODEL}.lora_rank": 64, f"{ROLLOUT}.load_format": "safetensors"}
SLEEPLESS = {f"{ROLLOUT}.free_cache_engine": False}


def part(prediction: Estimate, phase: str, component: str) -> int:
    """Bytes of one component in one phase."""
    return prediction.phase(phase).components.as_dict()[component]


@pytest.mark.parametrize("without_sleep", [SLEEPLESS, {f"{ROLLOUT}.enable_sleep_mode": False}])
def test_an_engine_that_does_not_sleep_is_there_in_every_phase(without_sleep: dict[str, Any]):
    """Weights and KV pool stay mapped through training and the weight sync."""
    prediction = estimate({**DYNAMIC, **without_sleep})
    pool = part(prediction, "rollout", "kv_cache")
    assert pool > 0
    assert [p.name for p in prediction.phases if p.components.kv_cache != pool] == []


def test_sglang_keeps_the_weights_that_adapters_sit_on():
    """A sleep of SGLang under LoRA frees the KV pool alone; vLLM moves the base weights to the host."""
    engines = {name: estimate({**LORA, f"{ROLLOUT}.name": name}) for name in ("sglang", "vllm")}
    held = {name: part(e, "update_actor", "weights") for name, e in engines.items()}
    assert held["sglang"] - held["vllm"] == engines["sglang"].phase("rollout").engine.weights


def test_merged_adapters_travel_as_whole_weights():
    """lora.merge sends every weight, gathered in fp32: more than the adapters of a layer."""
    layered = {**LORA, f"{ROLLOUT}.layered_summon": True}
    few = part(estimate(layered), "weight_sync", "communication_buffers")
    assert part(estimate({**layered, f"{MODEL}.lora.merge": True}), "weight_sync", "communication_buffers") > few


def test_adapters_of_experts_count_where_experts_are_linear_modules():
    """Before transformers 5 all-linear adapts each routed expert: many times the adapters of attention alone."""
    old, new = (
        part(estimate(LORA, model="qwen3-30b-a3b", version=version), "update_actor", "optimizer_states")
        for version in ("0.8.0", "0.9.1")
    )
    assert old > 10 * new


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"hard_budget": False, "budget": 3072}, 2 * 2048),
        ({"hard_budget": False, "budget": 4096}, int(4096 * 1.1)),
        ({"hard_budget": True, "budget": 3072}, 3072),
        ({"packed": False, "budget": 4096}, 256 * 2048),
        ({"packed": False, "budget": 4096, "lengths": Lengths(mean=512)}, 8 * 2048),
        ({"packed": False, "budget": 10**9, "lengths": Lengths(mean=512)}, 256 * 2048),
    ],
)
def test_a_token_budget_bounds_only_what_verl_counts(changes: dict[str, Any], tokens: int):
    """A soft budget between one and two sequences may meet two; a padded batch pays the full length for each sequence."""
    assert batch(dynamic=True, **changes).tokens() == tokens


def test_activation_offload_without_checkpointing_keeps_whole_layers_and_fills_the_host():
    """Two groups stay on the GPU with everything that a layer saves; the rest waits in host memory."""
    offload = {**DYNAMIC, f"{MODEL}.enable_activation_offload": True}
    both, alone = (
        estimate({**offload, f"{MODEL}.enable_gradient_checkpointing": on}, host_memory_bytes=2**41)
        for on in (True, False)
    )
    plain = estimate(DYNAMIC, host_memory_bytes=2**41)
    assert plain.host.peak_bytes < both.host.peak_bytes < alone.host.peak_bytes
    assert part(alone, "update_actor", "activations") < part(
        estimate({**DYNAMIC, f"{MODEL}.enable_gradient_checkpointing": False}), "update_actor", "activations"
    )


def test_the_actors_root_stays_while_the_critic_runs():
    """With fsdp_size=-1 the root that the log-probabilities gathered is still there in the critic's phases."""
    critic = {**DYNAMIC, "algorithm.adv_estimator": "gae"}
    kept, freed = (estimate({**critic, f"{ACTOR}.fsdp_config.fsdp_size": size}) for size in (-1, 8))
    root = 2 * problem(critic).model.root_parameters
    for phase in ("values", "update_critic"):
        assert part(kept, phase, "communication_buffers") - part(freed, phase, "communication_buffers") == root
    assert kept.phase("rollout").peak_bytes == freed.phase("rollout").peak_bytes


def test_moments_moved_to_the_host_are_still_reserved_in_0_8():
    """Without param_offload nothing empties the cache before the sync: optimizer_offload alone frees nothing by then."""
    resident, moved = (
        estimate({**DYNAMIC, f"{ACTOR}.fsdp_config.optimizer_offload": on}, version="0.8.0").phase("weight_sync")
        for on in (False, True)
    )
    assert moved.peak_bytes == resident.peak_bytes


def test_the_engine_workers_of_0_7_keep_what_those_of_0_8_keep():
    """trainer.use_legacy_worker_impl=disable: the cache of the update is still reserved in the weight sync."""
    legacy, engine = (
        part(
            estimate({**DYNAMIC, "trainer.use_legacy_worker_impl": impl}, version="0.7.1"),
            "weight_sync",
            "fragmentation",
        )
        for impl in ("auto", "disable")
    )
    assert engine > legacy + 2**30


def changes(plan: Plan) -> dict[str, object]:
    """New values by key."""
    return {change.key: change.new for change in plan.changes}


TENSOR_PARALLEL = f"{ROLLOUT}.tensor_model_parallel_size"
BATCHED = f"{ROLLOUT}.max_num_batched_tokens"
LONG = {"data.max_prompt_length": 1024, "data.max_response_length": 15360, **DYNAMIC}
FILLED = {f"{ACTOR}.ppo_max_token_len_per_gpu": 16384, f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 16384}


@pytest.mark.parametrize(
    ("values", "options", "wanted"),
    [
        ({**DYNAMIC, TENSOR_PARALLEL: 8}, {"model": "qwen2.5-7b"}, {TENSOR_PARALLEL: 4}),
        ({**DYNAMIC, TENSOR_PARALLEL: 4}, {"model": "qwen2.5-0.5b"}, {TENSOR_PARALLEL: 2}),
        ({**DYNAMIC, TENSOR_PARALLEL: 4}, {"model": "phi-4"}, {TENSOR_PARALLEL: 2}),
        ({**LONG, **FILLED}, {"version": "0.6.1", "hardware": "h200"}, {BATCHED: 16384}),
        ({**LONG, **FILLED}, {"version": "0.7.1", "hardware": "h200"}, {}),
        ({**LONG, **FILLED, f"{ROLLOUT}.mode": "async"}, {"version": "0.6.1", "hardware": "h200"}, {}),
        (
            {**DYNAMIC, f"{ROLLOUT}.enforce_eager": False},
            {"version": "0.4.1", "hardware": "h200"},
            {f"{ROLLOUT}.enforce_eager": True},
        ),
    ],
)
def test_what_verl_or_its_engine_refuses_is_put_right(
    values: dict[str, Any], options: dict[str, Any], wanted: dict[str, Any]
):
    """Heads that do not divide, chunks below the longest sequence, graphs that an old release refuses."""
    made = changes(make_plan(problem(values, **options)))
    fixed = (TENSOR_PARALLEL, BATCHED, f"{ROLLOUT}.enforce_eager")
    assert {key: made[key] for key in fixed if key in made} == wanted


@pytest.mark.parametrize(
    ("values", "version", "says"),
    [
        ({"data.train_batch_size": 30, f"{ACTOR}.ppo_mini_batch_size": 24}, "0.9.1", "train_batch_size=32"),
        ({**DYNAMIC, f"{ACTOR}.ppo_mini_batch_size": 12}, "0.9.1", "ppo_mini_batch_size=16"),
        ({**DYNAMIC, f"{ACTOR}.ppo_mini_batch_size": 4}, "0.6.1", "ppo_mini_batch_size=8"),
    ],
)
def test_batches_that_cannot_be_shared_out_stop_the_launch(values: dict[str, Any], version: str, says: str):
    """verl refuses them at any size of the GPU; the message says what to write."""
    with pytest.raises(ConfigError, match=says):
        make_plan(problem(values, version=version))


def test_an_engine_in_pipeline_stages_is_refused_by_name():
    """verl raises for it, whatever the size, in each release that reads the key; before 0.6 nothing does."""
    key = f"{ROLLOUT}.pipeline_model_parallel_size"
    with pytest.raises(ConfigError, match=rf"{key}=2: verl 0.9.1 has no engine in pipeline stages.*Write {key}=1"):
        make_plan(problem({**DYNAMIC, key: 2}))
    assert problem({**DYNAMIC, key: 1}).blockers == ()
    assert problem({**DYNAMIC, key: 2}, version="0.5.0").blockers == ()


def test_a_global_micro_batch_divides_the_prompts_of_a_mini_batch():
    """verl checks ppo_mini_batch_size, which counts prompts, against the deprecated global key."""
    whole = f"{ACTOR}.ppo_micro_batch_size"
    values = {
        f"{MODEL}.use_remove_padding": True,
        f"{ROLLOUT}.n": 5,
        f"{ACTOR}.ppo_mini_batch_size": 64,
        whole: 64,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 8,
        "data.max_response_length": 7680,
    }
    knob = next(k for k in problem(values, version="0.6.1").knobs if k.key == whole)
    assert knob.candidates == (32, 16, 8)


def test_a_sequence_too_long_for_one_gpu_is_spread_over_several():
    """Ulysses helps a dynamic batch only when its budget per GPU falls below one sequence; the reference follows."""
    values = {
        **DYNAMIC,
        "data.max_prompt_length": 2048,
        "data.max_response_length": 126976,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 131072,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 131072,
        f"{ACTOR}.use_kl_loss": True,
    }
    made = changes(make_plan(problem(values, hardware="h100")))
    size = made[f"{ACTOR}.ulysses_sequence_parallel_size"]
    assert isinstance(size, int) and size > 1
    assert made["actor_rollout_ref.ref.ulysses_sequence_parallel_size"] == size
    for key in (f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"):
        budget = made[key]
        assert isinstance(budget, int) and 129024 <= budget * size < 129024 + 64 * size


def test_layered_summon_comes_with_an_engine_that_loads_the_base_model():
    """verl raises where adapters are collected by layers and the engine started with dummy weights."""
    values = {**DYNAMIC, f"{MODEL}.lora_rank": 32, f"{ROLLOUT}.load_format": "dummy"}
    made = changes(make_plan(problem(values, model="qwen2.5-32b", hardware="a100-80")))
    assert made[f"{ROLLOUT}.layered_summon"] is True
    assert made[f"{ROLLOUT}.load_format"] == "safetensors"


def test_a_companion_never_moves_a_pinned_key():
    """offload_policy needs fsdp2; with the strategy pinned to fsdp it is not used, and nothing else would fit."""
    values = {**DYNAMIC, "trainer.n_gpus_per_node": 4, f"{ACTOR}.strategy": "fsdp"}
    policy = f"{ACTOR}.fsdp_config.offload_policy"
    free = make_plan(problem(values, model="qwen2.5-32b", host_memory_bytes=2**41))
    assert changes(free)[policy] is True and changes(free)[f"{ACTOR}.strategy"] == "fsdp2"
    with pytest.raises(NoPlanFits):
        make_plan(problem(values, model="qwen2.5-32b", host_memory_bytes=2**41), pinned=[f"{ACTOR}.strategy"])


@pytest.mark.parametrize("section", ["actor_rollout_ref.rollout", f"{ACTOR}.fsdp_config", "critic", "trainer"])
def test_a_value_in_place_of_a_section_is_not_read_as_unset(section: str):
    """Everything below would take a default that the launch does not have."""
    with pytest.raises(ConfigError, match="replaces a whole section"):
        estimate({section: -1})


@pytest.mark.parametrize(
    ("version", "key"),
    [("0.9.1", "critic.ppo_infer_max_token_len_per_gpu"), ("0.8.0", "critic.ppo_max_token_len_per_gpu")],
)
def test_the_critics_budget_holds_one_sequence(version: str, key: str):
    """verl finds out in the first update that its default of 32768 is below the longest sequence."""
    values = {
        **DYNAMIC,
        "algorithm.adv_estimator": "gae",
        "critic.use_dynamic_bsz": True,
        "data.max_prompt_length": 1024,
        "data.max_response_length": 39936,
    }
    made = changes(make_plan(problem(values, version=version, hardware="b200")))
    assert made[key] == 40960

"""verl's Megatron backend: each release's own config is read and planned, and what cannot be is one clear error."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NotModelled
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.adapter import WRITABLE_KEYS, VerlAdapter
from hydra_plugins.memfit.hardware.catalog import load as load_hardware
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Plan, Problem
from hydra_plugins.memfit.planning.search import check, make_plan

ACTOR, REF, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout", "model"))
MEGATRON = f"{ACTOR}.megatron"
OVERRIDE = f"{MEGATRON}.override_transformer_config"
TENSOR, PIPELINE = f"{MEGATRON}.tensor_model_parallel_size", f"{MEGATRON}.pipeline_model_parallel_size"
BASE = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 128,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 3072,
    f"{ACTOR}.ppo_mini_batch_size": 64,
    f"{ACTOR}.use_dynamic_bsz": True,
    f"{ACTOR}.use_kl_loss": True,
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.n": 4,
    "trainer.n_gpus_per_node": 8,
}


def problem(
    values: dict[str, Any],
    *,
    version: str = "0.9.1",
    hardware: str = "h100",
    model: str = "qwen2.5-7b",
    **options: Any,
) -> Problem:
    """Read verl's own Megatron config of ``version`` with ``values`` set."""
    config = OmegaConf.create(defaults.load(version, trainer="megatron"))
    for key, value in {**BASE, **values}.items():
        OmegaConf.update(config, key, value, force_add=True)
    context = Context(
        hardware=load_hardware(hardware),
        settings=Settings(framework_version=version, **options),
        resolve_model=load,
        model=load(model),
        explicit=frozenset(values),
    )
    return VerlAdapter().problem(plain(config), context)


def estimate(values: dict[str, Any], **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(problem(values, **options)).estimate


def changes(plan: Plan) -> dict[str, Any]:
    """What the plan sets."""
    return {change.key: change.new for change in plan.changes}


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_each_release_is_planned(version: str, estimator: str) -> None:
    """A 7B launch on 8 x H100 with the release's own Megatron config fits once it is planned; nothing else is written."""
    plan = make_plan(problem({"algorithm.adv_estimator": estimator, TENSOR: 2}, version=version))

    assert plan.fits
    assert set(changes(plan)) <= WRITABLE_KEYS
    assert ("update_critic" in {phase.name for phase in plan.estimate.phases}) == (estimator == "gae")


@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_a_tight_launch_spends_megatrons_knobs(version: str) -> None:
    """14B on 8 x 40 GB cards: offload, recomputation and parallel sizes make it fit, and training stays the same."""
    values = {TENSOR: 2, f"{ACTOR}.ppo_max_token_len_per_gpu": 8192}
    plan = make_plan(problem(values, version=version, hardware="a100-40", model="qwen2.5-14b"))

    assert not plan.requested.fits
    assert plan.fits
    assert plan.trains_the_same
    assert any("megatron" in key or "checkpoint" in key for key in changes(plan))


@pytest.mark.parametrize(
    ("key", "value", "phase"),
    [
        (f"{MEGATRON}.param_offload", True, "rollout"),
        (f"{MEGATRON}.optimizer_offload", True, "rollout"),
        (f"{REF}.megatron.param_offload", True, "rollout"),
        (TENSOR, 4, "update_actor"),
        (TENSOR, 4, "optimizer_step"),
        (PIPELINE, 4, "optimizer_step"),
        (f"{OVERRIDE}.recompute_granularity", "full", "update_actor"),
        (f"{MODEL}.use_fused_kernels", True, "old_log_prob"),
        (f"{ACTOR}.optim.override_optimizer_config.optimizer_cpu_offload", True, "optimizer_step"),
    ],
)
def test_each_key_relieves_its_phase(key: str, value: object, phase: str) -> None:
    """What the table of docs/verl.md promises for a key is what the prediction shows."""
    fraction = {f"{ACTOR}.optim.override_optimizer_config.optimizer_offload_fraction": 1.0}
    before, after = estimate({TENSOR: 2, **fraction}), estimate({TENSOR: 2, **fraction, key: value})

    assert after.phase(phase).peak_bytes < before.phase(phase).peak_bytes


def test_offload_takes_gradients_along() -> None:
    """param_offload gives the gradient buffer back outside the update; the update has it, whatever is offloaded."""
    offloaded, here = estimate({TENSOR: 2, f"{MEGATRON}.param_offload": True}), estimate({TENSOR: 2})

    assert offloaded.phase("rollout").trainer.gradients == 0
    assert here.phase("rollout").trainer.gradients > 0
    assert offloaded.phase("update_actor").trainer.gradients == here.phase("update_actor").trainer.gradients


def test_old_releases_bring_gradients_back_for_the_transfer() -> None:
    """Up to 0.5 the weight transfer loads parameters and gradient buffers; later parameters alone."""
    sent = {
        version: estimate({TENSOR: 2, f"{MEGATRON}.param_offload": True}, version=version).phase("weight_sync").trainer
        for version in ("0.5.0", "0.6.1")
    }

    assert sent["0.5.0"].gradients > 0
    assert sent["0.6.1"].gradients == 0


def test_checkpointing_of_0_4_does_nothing_by_itself() -> None:
    """enable_gradient_checkpointing with its own null settings recomputes nothing; with a granularity it does."""
    asked = {f"{MODEL}.enable_gradient_checkpointing": True}
    full = {
        **asked,
        f"{MODEL}.gradient_checkpointing_kwargs.activations_checkpoint_granularity": "full",
        f"{MODEL}.gradient_checkpointing_kwargs.activations_checkpoint_method": "uniform",
        f"{MODEL}.gradient_checkpointing_kwargs.activations_checkpoint_num_layers": 1,
    }
    none, flag, real = (
        estimate(values, version="0.4.1").phase("update_actor").trainer.activations for values in ({}, asked, full)
    )

    assert none == flag > real


def test_micro_batches_are_those_of_megatrons_ranks() -> None:
    """TP 8 leaves one data-parallel rank: a mini-batch that eight FSDP ranks could not share is fine."""
    plan = check(problem({TENSOR: 4, PIPELINE: 2, f"{ACTOR}.ppo_mini_batch_size": 12, f"{ROLLOUT}.n": 1}))

    assert plan.problem.blockers == ()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({TENSOR: 3}, ConfigError, "does not divide the 8 GPUs"),
        ({TENSOR: 4, PIPELINE: 4}, ConfigError, "= 16 does not divide the 8 GPUs"),
        ({TENSOR: 8}, ConfigError, "28 heads"),
        ({PIPELINE: 8}, ConfigError, "num_layers_in_last_pipeline_stage"),
        ({f"{MEGATRON}.expert_model_parallel_size": 2}, ConfigError, "has no experts"),
        (
            {PIPELINE: 4, f"{MEGATRON}.virtual_pipeline_model_parallel_size": 3},
            ConfigError,
            "the 7 layers of a pipeline",
        ),
        ({f"{OVERRIDE}.recompute_granularity": "some"}, ConfigError, "is not one of full, selective"),
        ({f"{OVERRIDE}.recompute_modules": ["attn"]}, ConfigError, "names attn"),
        ({f"{MODEL}.lora.rank": 16}, NotModelled, "LoRA on Megatron"),
        ({f"{MEGATRON}.use_megatron_fsdp": True}, NotModelled, "use_megatron_fsdp=True"),
        ({f"{MEGATRON}.dynamic_context_parallel": True}, NotModelled, "dynamic context parallelism"),
        ({f"{OVERRIDE}.fp8": "hybrid"}, NotModelled, "fp8=hybrid"),
        ({f"{MEGATRON}.dtype": "float32"}, NotModelled, "dtype=float32"),
        ({f"{ACTOR}.optim.optimizer": "muon"}, NotModelled, "optimizer=muon"),
        ({"algorithm.adv_estimator": "gae", "critic.strategy": "fsdp"}, NotModelled, "critic.strategy=fsdp"),
        ({f"{OVERRIDE}.pipeline_model_parallel_layout": "Et*3|t*4L"}, NotModelled, "pipeline_model_parallel_layout"),
    ],
)
def test_what_cannot_be_judged_is_one_clear_error(
    values: dict[str, Any], error: type[MemfitError], message: str
) -> None:
    """Impossible sizes, and what is not modelled, are refused by name with the way out."""
    with pytest.raises(error, match=message) as caught:
        check(problem(values))

    assert "Write" in str(caught.value) or "memfit.strict=false" in str(caught.value) or "Choose" in str(caught.value)


def test_embedding_and_loss_count_as_places_of_a_chunk() -> None:
    """28 layers with embedding and loss are 30 places: two stages of three chunks of five, where 14 layers alone are not."""
    chunks = {PIPELINE: 2, f"{MEGATRON}.virtual_pipeline_model_parallel_size": 3}
    counted = {f"{OVERRIDE}.account_for_{what}_in_pipeline_split": True for what in ("embedding", "loss")}

    with pytest.raises(ConfigError, match="the 14 layers"):
        check(problem(chunks))
    assert check(problem({**chunks, **counted})).estimate.phases


def test_batches_that_cannot_be_shared_out_stop_the_launch() -> None:
    """verl asks for a multiple of the data-parallel ranks times the micro-batch; the message says what to write."""
    static = {f"{ACTOR}.use_dynamic_bsz": False, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 3, TENSOR: 2}
    with pytest.raises(ConfigError, match=r"data.train_batch_size=132"):
        make_plan(problem(static))


def test_the_interleaved_schedule_wants_whole_rounds() -> None:
    """15 static micro-batches over two stages with two chunks each: refused with what to write; 16 are fine."""
    chunks = {
        PIPELINE: 2,
        f"{MEGATRON}.virtual_pipeline_model_parallel_size": 2,
        f"{ACTOR}.use_dynamic_bsz": False,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4,
        f"{REF}.log_prob_micro_batch_size_per_gpu": 4,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
    }
    uneven = problem({**chunks, "data.train_batch_size": 120, f"{ACTOR}.ppo_mini_batch_size": 60})

    assert any("interleaved schedule" in line for line in uneven.blockers)
    assert problem(chunks).blockers == ()


def test_fast_takes_offload_back() -> None:
    """Under memfit.goal=fast an offload that is not needed is switched off."""
    roomy = {TENSOR: 4, f"{MEGATRON}.param_offload": True, f"{MEGATRON}.optimizer_offload": True}
    plan = make_plan(problem(roomy, hardware="b200", goal="fast"))

    assert changes(plan)[f"{MEGATRON}.param_offload"] is False
    assert changes(plan)[f"{MEGATRON}.optimizer_offload"] is False


def test_other_sizes_of_the_reference_are_said_aloud() -> None:
    """Megatron makes its groups once: the actor's sizes hold for every role, and the report says so."""
    plan = check(problem({TENSOR: 4, f"{REF}.megatron.tensor_model_parallel_size": 2}))

    assert any("the prediction has the actor's sizes" in line for line in plan.warnings)


def test_the_worst_stage_is_shown() -> None:
    """With a pipeline each phase is that of its worst stage: logits from the last, most activations from the first."""
    found = estimate({PIPELINE: 4, f"{ACTOR}.ppo_max_token_len_per_gpu": 8192})

    assert found.phase("old_log_prob").trainer.logits > 0
    assert found.phase("update_actor").trainer.logits == 0


def test_a_mixture_of_experts_is_planned() -> None:
    """30B-A3B on 16 x H100, experts over 8 ranks: it fits with full recomputation."""
    values = {
        TENSOR: 2,
        f"{MEGATRON}.expert_model_parallel_size": 8,
        f"{MEGATRON}.expert_tensor_parallel_size": 1,
        "trainer.nnodes": 2,
        f"{ROLLOUT}.tensor_model_parallel_size": 4,
    }
    plan = make_plan(problem(values, model="qwen3-30b-a3b"))

    assert plan.fits

"""verl's keys become facts: micro-batches, loss heads, engines and refusals, release by release."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NoPlanFits, NotModelled
from hydra_plugins.memfit.base.settings import Lengths, Settings
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.adapter import WRITABLE_KEYS, VerlAdapter
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.verl.versions import engine_share
from hydra_plugins.memfit.hardware.catalog import load as load_hardware
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem
from hydra_plugins.memfit.planning.search import check, make_plan

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
GRPO = {"algorithm.adv_estimator": "grpo", f"{ROLLOUT}.name": "vllm", "trainer.n_gpus_per_node": 8}


def problem(
    values: dict[str, Any],
    *,
    version: str = "0.9.1",
    hardware: str = "a100-80",
    model: str = "qwen2.5-7b",
    environ: dict[str, str] | None = None,
    explicit: frozenset[str] | None = None,
    **options: Any,
) -> Problem:
    """Read verl's defaults of ``version`` with ``values`` set."""
    config = OmegaConf.create(defaults.load(version))
    for key, value in {**GRPO, **values}.items():
        OmegaConf.update(config, key, value, force_add=True)
    context = Context(
        hardware=load_hardware(hardware),
        settings=Settings(framework_version=version, **options),
        resolve_model=load,
        model=load(model),
        environ=environ or {},
        explicit=frozenset(values) if explicit is None else explicit,
    )
    return VerlAdapter().problem(plain(config), context)


def estimate(values: dict[str, Any], **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(problem(values, **options)).estimate


def batch(**changes: Any) -> Batch:
    """256 sequences of at most 2048 tokens on one rank, static micro-batches of 8."""
    facts: dict[str, Any] = {
        "dynamic": False,
        "budget": 16384,
        "micro_batch": 8,
        "local_sequences": 256,
        "sequence_parallel": 1,
        "max_length": 2048,
        "packed": True,
        "hard_budget": True,
        "lengths": Lengths(),
    }
    return Batch(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 8 * 2048),
        ({"micro_batch": None}, 256 * 2048),
        ({"micro_batch": 1000}, 256 * 2048),
        ({"sequence_parallel": 2}, 4 * 2048),
        ({"dynamic": True}, 16384),
        ({"dynamic": True, "sequence_parallel": 4}, 16384),
        ({"dynamic": True, "hard_budget": False}, 18022),
        ({"dynamic": True, "local_sequences": 2}, 2 * 2048),
        ({"lengths": Lengths(max=1024)}, 8 * 1024),
        ({"lengths": Lengths(mean=300, max=300)}, 8 * 300),
        ({"lengths": Lengths(mean=300), "micro_batch": 1}, 2048),
        ({"packed": False, "lengths": Lengths(mean=300)}, 8 * 2048),
        ({"dynamic": True, "lengths": Lengths(mean=300)}, 16384),
    ],
)
def test_tokens_of_a_micro_batch(changes: dict[str, Any], tokens: int):
    """Static batches count sequences, dynamic ones their budget; real lengths lower packed static batches alone."""
    assert batch(**changes).tokens() == tokens


def test_a_mean_length_counts_about_b_times_mean_and_never_more_than_b_times_max():
    """64 sequences of 300 tokens on average lie above 64 x 300 and far below 64 x 2048."""
    tokens = batch(micro_batch=64, lengths=Lengths(mean=300)).tokens()
    assert 64 * 300 < tokens < 64 * 500
    assert batch(micro_batch=64, lengths=Lengths(mean=2000, max=2048)).tokens() <= 64 * 2048


@pytest.mark.parametrize(
    ("engine", "version", "share"),
    [
        ("vllm", "0.8.5", "device"),
        ("vllm", "0.8.5.post1", "device"),
        ("vllm", "0.11.0", "own"),
        ("vllm", "0.20.1", "own"),
        ("vllm", "0.24.0", "own_with_graphs"),
        ("sglang", "0.5.12", "free"),
    ],
)
def test_what_the_engines_fraction_means(engine: str, version: str, share: str):
    """vLLM changed the meaning of gpu_memory_utilization at 0.11 and at 0.21; SGLang's is of what is free."""
    assert engine_share(engine, version) == share


def logits(values: dict[str, Any], phase: str, **options: Any) -> int:
    """The logits of one phase at 8192 tokens."""
    fixed = {
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 8192,
        f"{MODEL}.use_remove_padding": True,
    }
    return estimate({**fixed, **values}, **options).phase(phase).components.logits


def test_the_loss_head_follows_the_keys_that_the_release_reads():
    """Temperature, compiled entropy and its keys: 0.9.1 copies the scaled logits, 0.8.0 divides in place; 0.8.0 ignores actor.*."""
    one = 2 * 8192 * load("qwen2.5-7b").vocab_size
    assert logits({}, "old_log_prob") == one
    assert logits({f"{ROLLOUT}.temperature": 0.7}, "old_log_prob") == 2 * one
    assert logits({f"{ROLLOUT}.temperature": 0.7}, "old_log_prob", version="0.8.0") == pytest.approx(
        1.1 * one, rel=1e-3
    )
    compiled = f"{ACTOR}.fsdp_config.use_torch_compile"
    assert logits({compiled: False}, "old_log_prob") == 7 * one
    assert logits({f"{ACTOR}.use_torch_compile": False}, "old_log_prob") == one
    assert logits({f"{ACTOR}.use_torch_compile": False}, "old_log_prob", version="0.6.1") > 7 * one
    assert logits({f"{ACTOR}.entropy_coeff": 0.001}, "update_actor") > logits({}, "update_actor")
    assert logits({f"{MODEL}.use_fused_kernels": True}, "old_log_prob") == 0


def test_deprecated_global_micro_batches_are_divided_by_the_ranks():
    """ppo_micro_batch_size=64 on 8 GPUs is 8 a GPU; a legacy worker keeps the key, the engine classes need the other one."""
    per_gpu = estimate({f"{ACTOR}.ppo_micro_batch_size_per_gpu": 8})
    whole = estimate({f"{ACTOR}.ppo_micro_batch_size": 64})
    assert per_gpu.phase("update_actor") == whole.phase("update_actor")
    values = {f"{ACTOR}.ppo_micro_batch_size": 256, "data.max_response_length": 4096}
    old = {c.key: c.new for c in make_plan(problem(values, version="0.6.1")).changes}
    assert old[f"{ACTOR}.ppo_micro_batch_size"] < 256 and old[f"{ACTOR}.ppo_micro_batch_size"] % 8 == 0
    new = {c.key: c.new for c in make_plan(problem(values)).changes}
    assert new[f"{ACTOR}.ppo_micro_batch_size"] is None and 1 <= new[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] < 32


def test_the_critic_of_0_8_is_always_dynamic():
    """Its values have a budget of their own that the yaml lacks, and the documented keys of the critic do nothing."""
    gae = {"algorithm.adv_estimator": "gae", "critic.ppo_micro_batch_size_per_gpu": 1}
    asked = estimate(gae, version="0.8.0")
    assert asked.phase("update_critic") == estimate({"algorithm.adv_estimator": "gae"}, version="0.8.0").phase(
        "update_critic"
    )
    small = estimate({**gae, "critic.ppo_infer_max_token_len_per_gpu": 2048}, version="0.8.0")
    assert small.phase("values").peak_bytes < asked.phase("values").peak_bytes


def test_offload_does_not_lower_the_update_and_lowers_the_rollout():
    """States come back for the update: only phases of others are relieved, at the cost of host memory."""
    off = {f"{ACTOR}.fsdp_config.optimizer_offload": True, f"{ACTOR}.fsdp_config.param_offload": True}
    base = {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4, f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4}
    kept, moved = estimate(base), estimate({**base, **off})
    assert moved.phase("update_actor").peak_bytes == kept.phase("update_actor").peak_bytes
    assert moved.phase("rollout").peak_bytes < kept.phase("rollout").peak_bytes
    assert moved.host.peak_bytes > kept.host.peak_bytes


def test_the_critics_budget_is_where_the_release_reads_it():
    """0.9.1 knows one budget for the critic, which its yaml does not have; 0.7.1 reads the documented keys."""
    gae = {"algorithm.adv_estimator": "gae", f"{ACTOR}.use_dynamic_bsz": True}
    dead = estimate({**gae, "critic.ppo_max_token_len_per_gpu": 4096}).phase("update_critic")
    assert dead == estimate(gae).phase("update_critic")
    live = estimate({**gae, "critic.ppo_infer_max_token_len_per_gpu": 4096}).phase("update_critic")
    assert live.peak_bytes < dead.peak_bytes
    old = {"critic.model.use_remove_padding": True, f"{MODEL}.use_remove_padding": True, **gae}
    assert (
        estimate({**old, "critic.ppo_max_token_len_per_gpu": 4096}, version="0.7.1").phase("update_critic").peak_bytes
        < estimate(old, version="0.7.1").phase("update_critic").peak_bytes
    )


def test_the_reference_exists_when_a_kl_term_does_and_lives_on_the_host():
    """No KL, no reference phase; with it, its states are in host memory whatever param_offload says."""
    assert "ref_log_prob" not in [p.name for p in estimate({}).phases]
    with_reference = estimate({f"{ACTOR}.use_kl_loss": True})
    assert with_reference.phase("ref_log_prob").components.weights == estimate({}).phase("rollout").trainer.weights
    assert with_reference.host.peak_bytes > estimate({}).host.peak_bytes


def test_lora_trains_adapters_alone():
    """With LoRA, gradients and moments are those of the adapters, and the weight sync carries no model."""
    lora = estimate({f"{MODEL}.lora_rank": 32, f"{ROLLOUT}.layered_summon": True})
    full = estimate({})
    assert lora.phase("optimizer_step").components.gradients < full.phase("optimizer_step").components.gradients / 50
    assert lora.phase("weight_sync").peak_bytes < full.phase("weight_sync").peak_bytes


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({f"{ACTOR}.strategy": "megatron"}, ConfigError, "actor.strategy=megatron"),
        ({f"{ACTOR}.strategy": "veomni"}, NotModelled, "actor.strategy=veomni"),
        ({f"{ROLLOUT}.name": "hf"}, ConfigError, "rollout.name=hf"),
        ({"reward.reward_model.enable": True}, ConfigError, "memfit.models.reward"),
        ({"data.train_batch_size": 0}, ConfigError, "fully asynchronous"),
        ({"data.train_batch_size": -4}, ConfigError, r"data.train_batch_size=-4 is below"),
        ({"data.max_response_length": "long"}, ConfigError, "data.max_response_length='long' is not a whole number"),
        ({"data.max_response_length": 1.5}, ConfigError, "not a whole number"),
        ({f"{ACTOR}.use_dynamic_bsz": "yes"}, ConfigError, "is not true or false"),
        ({f"{ROLLOUT}.gpu_memory_utilization": 1.5}, ConfigError, "between 0.0 and 1.0"),
        ({f"{ACTOR}.fsdp_config.model_dtype": "int4"}, ConfigError, "model_dtype=int4"),
        ({f"{ACTOR}.ppo_mini_batch_size": 2048}, ConfigError, "ppo_mini_batch_size=2048 is above"),
    ],
)
def test_what_cannot_be_judged_is_one_clear_error(values: dict[str, Any], error: type[MemfitError], message: str):
    """Each names the key, the value and a way out."""
    with pytest.raises(error, match=message):
        estimate(values)


def test_tpu_and_unknown_releases_are_refused():
    """verl runs on GPUs, and keys of other releases are not guessed."""
    with pytest.raises(NotModelled, match="name a GPU"):
        problem({}, hardware="v4-16")
    with pytest.raises(MemfitError, match=r"0\.3\.0"):
        VerlAdapter().defaults("0.3.0")


def test_what_verl_itself_would_refuse_is_mended():
    """Rollout TP that does not divide the GPUs, a default mini-batch above the batch, a budget below one sequence."""
    plan = make_plan(
        problem(
            {
                "trainer.n_gpus_per_node": 1,
                "data.train_batch_size": 64,
                f"{ACTOR}.use_dynamic_bsz": True,
                f"{ACTOR}.ppo_max_token_len_per_gpu": 512,
            },
            model="qwen2.5-0.5b",
        )
    )
    written = {change.key: change.new for change in plan.changes}
    assert written[f"{ROLLOUT}.tensor_model_parallel_size"] == 1
    assert written[f"{ACTOR}.ppo_max_token_len_per_gpu"] == 1024
    static = make_plan(problem({"data.train_batch_size": 64}, model="qwen2.5-0.5b"))
    assert {c.key: c.new for c in static.changes}[f"{ACTOR}.ppo_mini_batch_size"] == 64


@pytest.mark.parametrize(
    ("engine_version", "stops"), [("0.8.5", True), ("0.18.0", True), ("0.20.0", False), ("0.24.0", False)]
)
def test_expandable_segments_stop_a_vllm_that_refuses_them(engine_version: str, stops: bool):
    """torch's own advice kills a sleeping vLLM up to 0.18: strict stops with the fix, not strict warns."""
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments:True"}
    launch = problem({}, environ=environ, engine_version=engine_version)
    if not stops:
        assert make_plan(launch).fits
        return
    with pytest.raises(ConfigError, match="unset PYTORCH_CUDA_ALLOC_CONF"):
        make_plan(launch)
    lenient = make_plan(problem({}, environ=environ, engine_version=engine_version, strict=False))
    assert any("expandable_segments" in warning for warning in lenient.warnings)
    awake = {f"{ROLLOUT}.free_cache_engine": False, f"{ROLLOUT}.gpu_memory_utilization": 0.3}
    make_plan(problem(awake, environ=environ, engine_version=engine_version))


@pytest.mark.parametrize(
    ("key", "size", "says"),
    [
        (f"{ACTOR}.ulysses_sequence_parallel_size", 4, ""),
        (f"{ACTOR}.ulysses_sequence_parallel_size", 3, "does not divide the 8 GPUs"),
        (f"{ACTOR}.ulysses_sequence_parallel_size", 16, "does not divide the 8 GPUs"),
        (f"{ACTOR}.ulysses_sequence_parallel_size", 8, "28 attention heads"),
        (f"{ACTOR}.fsdp_config.fsdp_size", 4, ""),
        (f"{ACTOR}.fsdp_config.fsdp_size", 16, ""),
        (f"{ACTOR}.fsdp_config.fsdp_size", 3, "does not divide the 8 GPUs"),
    ],
)
@pytest.mark.parametrize("version", ["0.4.1", "0.9.1"])
def test_groups_that_do_not_divide_are_refused(key: str, size: int, says: str, version: str):
    """Ulysses divides GPUs and heads, FSDP's groups divide GPUs; a group as large as the launch, or larger, is all of it."""
    values = {key: size, "trainer.n_gpus_per_node": 8, "actor_rollout_ref.model.use_remove_padding": True}

    found = [blocker for blocker in problem(values, version=version).blockers if blocker.startswith(key)]

    assert len(found) == bool(says)
    assert all(says in blocker and f"Write {key}=" in blocker for blocker in found)


LAUNCHES = st.fixed_dictionaries(
    {
        "data.max_response_length": st.sampled_from([512, 2048, 8192]),
        "data.train_batch_size": st.sampled_from([64, 256, 1024]),
        f"{ACTOR}.use_dynamic_bsz": st.booleans(),
        f"{ACTOR}.use_kl_loss": st.booleans(),
        "algorithm.adv_estimator": st.sampled_from(["grpo", "gae"]),
        f"{ROLLOUT}.gpu_memory_utilization": st.sampled_from([0.1, 0.5, 0.9]),
        f"{ROLLOUT}.temperature": st.sampled_from([1.0, 0.7]),
        f"{MODEL}.enable_gradient_checkpointing": st.booleans(),
        f"{ACTOR}.strategy": st.sampled_from(["fsdp", "fsdp2"]),
        f"{MODEL}.lora_rank": st.sampled_from([0, 32]),
        "trainer.n_gpus_per_node": st.sampled_from([1, 4, 8]),
    }
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=LAUNCHES,
    version=st.sampled_from(defaults.VERSIONS),
    hardware=st.sampled_from(["a40", "a100-80", "h200"]),
    model=st.sampled_from(["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-30b-a3b"]),
)
def test_whatever_is_asked_a_plan_fits_by_keys_of_the_frozen_list(
    values: dict[str, Any], version: str, hardware: str, model: str
):
    """A plan fits by its own account, writes only listed keys, changes no training and is a fixed point, or is refused."""
    try:
        launch = problem(values, version=version, hardware=hardware, model=model)
        plan = make_plan(launch)
    except (NoPlanFits, ConfigError):
        return
    written = {change.key: change.new for change in plan.changes}
    assert plan.fits and plan.trains_the_same and len(written) == len(plan.changes)
    assert set(written) <= WRITABLE_KEYS
    assert not {"data.train_batch_size", "data.max_response_length", f"{ROLLOUT}.n", f"{MODEL}.lora_rank"} & set(
        written
    )
    again = make_plan(problem({**values, **written}, version=version, hardware=hardware, model=model))
    assert again.changes == ()


@pytest.mark.parametrize(
    "values",
    [
        {"data.train_batch_size": 10**30},
        {f"{ROLLOUT}.n": 10**11},
        {"data.train_batch_size": 10**9, f"{ROLLOUT}.n": 10**9},
        {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 10**9},
    ],
)
def test_absurd_sizes_end_at_once(values: dict[str, Any]):
    """A slip of many zeros is an error or a plan, never a hang."""
    for version in ("0.6.1", "0.9.1"):
        try:
            make_plan(problem(values, version=version))
        except (ConfigError, NoPlanFits) as error:
            assert str(error)


def test_a_fused_head_and_fsdp2_are_never_planned_together_on_an_untied_model():
    """verl 0.9.1's fused head reads an lm_head that FSDP2 shards by itself: such a launch is refused, and never planned."""
    both = {f"{MODEL}.use_fused_kernels": True, f"{ACTOR}.strategy": "fsdp2", f"{ACTOR}.use_dynamic_bsz": True}
    assert not estimate(both).fits
    assert estimate(both, model="qwen2.5-3b").fits
    tight = {"trainer.n_gpus_per_node": 1, f"{ACTOR}.use_dynamic_bsz": True, "data.max_response_length": 4096}
    plan = make_plan(problem(tight, hardware="rtx4090"))
    written = {change.key: change.new for change in plan.changes}
    assert written[f"{ACTOR}.strategy"] == "fsdp2" and f"{MODEL}.use_fused_kernels" not in written


def test_a_critic_named_in_yaml_is_the_users_own():
    """verl's placeholder stands for the actor's shape; any other path counts, written on the command line or not."""
    gae = {"algorithm.adv_estimator": "gae"}
    same = estimate(gae).phase("update_critic")
    named = {**gae, "critic.model.path": "qwen2.5-0.5b"}
    own = estimate(named, explicit=frozenset()).phase("update_critic")
    assert own.components.optimizer_states < 0.6 * same.components.optimizer_states  # the actor's 7B is in both


def test_a_card_without_flash_attention_counts_the_fallback():
    """Before Ampere verl falls back to a log-softmax that is saved row by row; the plan says that it cannot know the rest."""
    values = {f"{ACTOR}.use_dynamic_bsz": True, f"{MODEL}.use_remove_padding": True}
    old, new = (problem(values, hardware=card, model="qwen2.5-0.5b") for card in ("v100-32", "a100-40"))
    logits_of = [check(p).estimate.phase("update_actor").components.logits for p in (old, new)]
    assert logits_of[0] == 3 * logits_of[1]
    assert any("flash-attn" in warning for warning in old.warnings)


def test_a_critic_too_large_for_its_update_moves_to_the_host():
    """PPO with a critic on two small cards: the critic's optimizer steps on the host, as the actor's does."""
    values = {"algorithm.adv_estimator": "gae", "trainer.n_gpus_per_node": 2}
    plan = make_plan(problem(values, hardware="rtx4090", model="qwen2.5-3b"))
    written = {change.key: change.new for change in plan.changes}
    assert written["critic.fsdp.offload_policy"] is True and written["critic.strategy"] == "fsdp2"

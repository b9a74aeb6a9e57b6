"""verl's models beside the policy: reward models in the trainer and in engines, teachers; where they are and what they take."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, ModelNotFound, NotModelled
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.writable import WRITABLE_KEYS
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.memory.overheads import CUDA_CONTEXT_BYTES, engine_context_bytes
from hydra_plugins.memfit.model.resolve import load as load_model
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import SOLVE, Plan
from hydra_plugins.memfit.planning.search import check, make_plan
from support.verl_launch import Job, compose_jobs, words
from support.verl_problem import ARR, read_problem
from support.verl_wheels import package

GIB = 1 << 30
OWN = {
    "reward_model.enable": True,
    "reward_model.model.path": "llama-3.1-8b",
    f"{ARR}.actor.use_dynamic_bsz": False,
    f"{ARR}.actor.ppo_micro_batch_size_per_gpu": 1,
    f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu": 1,
    "reward_model.micro_batch_size_per_gpu": 16,
}
REWARD = "reward.reward_model"
ENGINE = {f"{REWARD}.enable": True, f"{REWARD}.model_path": "qwen2.5-32b", f"{REWARD}.rollout.name": "vllm"}
APART = {**ENGINE, f"{REWARD}.enable_resource_pool": True, f"{REWARD}.nnodes": 1, f"{REWARD}.n_gpus_per_node": 4}
TEACHER = "distillation.teacher_models.teacher_model"
TAUGHT = {
    "distillation.enabled": True,
    "distillation.nnodes": 1,
    "distillation.n_gpus_per_node": 4,
    f"{TEACHER}.model_path": "qwen2.5-32b",
}
SHARE, TEACHERS_SHARE = f"{REWARD}.rollout.gpu_memory_utilization", f"{TEACHER}.inference.gpu_memory_utilization"
IN_TRAINER, IN_ENGINE = ("0.4.1", "0.5.0", "0.6.1"), ("0.7.1", "0.8.0", "0.9.1")


def estimate(values: dict[str, Any], **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(read_problem(values, **options)).estimate


def planned(values: dict[str, Any], **options: Any) -> Plan:
    """The plan for the launch."""
    return make_plan(read_problem(values, **options), options.get("pinned", ()))


# -- in the trainer -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", IN_TRAINER)
def test_the_trainers_own_reward_model_visits_the_gpu_layer_by_layer(version: str) -> None:
    """It adds one phase and nothing to any other; its 16 GB in bf16 wait on the host, a share for each GPU."""
    values = {**OWN, f"{ARR}.actor.fsdp_config.optimizer_offload": True}
    without = {key: value for key, value in values.items() if not key.startswith("reward_model")}
    plain, scored = estimate(without, version=version), estimate(values, version=version)
    phases = {phase.name: phase for phase in scored.phases}

    assert {phase.name: phase for phase in plain.phases} == {n: p for n, p in phases.items() if n != "values"}
    assert phases["values"].trainer.weights == phases["update_actor"].trainer.weights
    assert 0 < phases["values"].trainer.communication_buffers < 3 * GIB
    assert scored.host.peak_bytes - plain.host.peak_bytes == pytest.approx(2 * 7.5e9, rel=0.02)


def test_its_micro_batch_is_planned() -> None:
    """A micro-batch that does not fit is made smaller, an unset one is filled in; offload is no knob: it always is."""
    large = planned({**OWN, "reward_model.micro_batch_size_per_gpu": 1024, f"{ARR}.rollout.n": 8}, version="0.5.0")
    unset = planned({**OWN, "reward_model.micro_batch_size_per_gpu": None}, version="0.5.0")
    key = "reward_model.micro_batch_size_per_gpu"

    assert 1 <= next(int(str(c.new)) for c in large.changes if c.key == key) < 1024
    assert next(int(str(c.new)) for c in unset.changes if c.key == key) >= 1
    assert large.estimate.phase("values").fits and large.trains_the_same


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (OWN, "reward_model.model.use_remove_padding"),
        ({"algorithm.adv_estimator": "gae"}, "critic.model.use_remove_padding"),
    ],
)
def test_padding_is_removed_where_a_budget_does_not_bound_it(values: dict[str, Any], key: str) -> None:
    """A token budget counts real tokens: padded, all sequences of a rank may share a micro-batch."""
    dynamic = {**values, f"{ARR}.actor.use_dynamic_bsz": True, "data.max_response_length": 8192, f"{ARR}.rollout.n": 8}
    plan = planned(dynamic, version="0.5.0", hardware="h200")

    assert not plan.requested.phase("values").fits
    assert plan.fits and {change.key: change.new for change in plan.changes}[key] is True


def test_critic_and_reward_model_share_a_phase() -> None:
    """`values` is that of the model with less room left."""
    critic = {**OWN, "algorithm.adv_estimator": "gae", "critic.ppo_micro_batch_size_per_gpu": 1}
    small = estimate({**critic, "reward_model.micro_batch_size_per_gpu": 1}, version="0.5.0").phase("values")
    large = estimate({**critic, "reward_model.micro_batch_size_per_gpu": 512}, version="0.5.0").phase("values")

    assert small.trainer.optimizer_states == large.trainer.optimizer_states
    assert small.peak_bytes < large.peak_bytes


def test_its_sequences_have_their_own_length() -> None:
    """reward_model.max_length counts where the reward model has another template."""
    longer = estimate({**OWN, "reward_model.max_length": 8192}, version="0.6.1").phase("values")

    assert longer.trainer.activations > 6 * estimate(OWN, version="0.6.1").phase("values").trainer.activations


# -- in an engine ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", IN_ENGINE)
def test_a_guest_sleeps_in_every_phase_but_its_own(version: str) -> None:
    """Its context, its worker's and nothing more lies beside the others; its weights are on the GPU in `generate` alone."""
    plain, hosted = estimate({}, version=version), estimate(ENGINE, version=version)
    asleep = CUDA_CONTEXT_BYTES + engine_context_bytes(tensor_parallel=2, in_process=False)
    names = {phase.name for phase in plain.phases} - {"launch"}

    assert {n: hosted.phase(n).peak_bytes - plain.phase(n).peak_bytes for n in names} == dict.fromkeys(names, asleep)
    assert hosted.phase("generate").engine.weights == load_model("qwen2.5-32b").parameters + 1
    assert hosted.phase("generate").trainer == plain.phase("rollout").trainer


def test_its_weights_wait_on_the_host() -> None:
    """Sleep level 1 keeps a copy for each GPU in host memory."""
    more = estimate(ENGINE).host.peak_bytes - estimate({}).host.peak_bytes

    assert more == 8 * (2 * 4 * GIB + load_model("qwen2.5-32b").parameters + 1)


def test_the_policys_share_leaves_room_for_a_sleeping_guest() -> None:
    """What is solved for is smaller by what the guest keeps."""
    key = f"{ARR}.rollout.gpu_memory_utilization"
    alone, beside = (read_problem({**v, key: 0.95}).estimate({key: SOLVE}) for v in ({}, ENGINE))

    assert beside.fits and dict(beside.solved)[key] < dict(alone.solved)[key]


@pytest.mark.parametrize("version", IN_ENGINE)
def test_a_guests_share_is_planned(version: str) -> None:
    """A share that does not leave room for the resting trainer is lowered; one below the weights is raised."""
    greedy = planned({**ENGINE, SHARE: 0.95}, version=version)
    small = planned({**ENGINE, SHARE: 0.2}, version=version)
    shares = [next(float(str(c.new)) for c in plan.changes if c.key == SHARE) for plan in (greedy, small)]

    assert greedy.fits and small.fits
    assert 0.45 < shares[0] < 0.95
    assert 0.45 < shares[1] < 0.95


def test_a_reward_model_in_its_own_pool_leaves_the_trainer_alone() -> None:
    """No phase of the trainer changes; `generate` is that of a GPU without a trainer."""
    plain, apart = estimate({}), estimate(APART)
    names = {phase.name for phase in plain.phases} - {"launch"}

    assert all(apart.phase(name) == plain.phase(name) for name in names)
    assert apart.phase("generate").trainer.total_bytes == CUDA_CONTEXT_BYTES


def test_an_engine_that_does_not_sleep_stays() -> None:
    """free_cache_engine=false: its share stands in every phase, and is not memfit's to choose."""
    values = {**ENGINE, f"{REWARD}.rollout.free_cache_engine": False, SHARE: 0.6}
    awake = estimate(values)

    assert awake.phase("update_actor").engine.weights == load_model("qwen2.5-32b").parameters + 1
    assert awake.phase("update_actor").engine.kv_cache > 0
    assert SHARE not in [knob.key for knob in read_problem(values).knobs]


# -- teachers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["0.8.0", "0.9.1"])
def test_a_teachers_prompts_take_rows_of_logits(version: str) -> None:
    """10 bytes for each of the 1025 tokens of a sequence and each entry of the vocabulary, outside the share."""
    generate = estimate(TAUGHT, version=version).phase("generate")

    assert generate.engine.logits == 10 * 1025 * 152064
    assert generate.engine.kv_cache > 0


def test_a_teachers_share_leaves_room_for_its_logits() -> None:
    """A share that vLLM itself would accept is lowered; the chunk is the other knob."""
    longer = {**TAUGHT, TEACHERS_SHARE: 0.95, "data.max_response_length": 8192}
    plan = planned(longer)
    changed = {change.key: change.new for change in plan.changes}

    assert not plan.requested.phase("generate").fits
    assert plan.requested.phase("launch").fits
    assert plan.fits and changed.keys() <= {TEACHERS_SHARE, f"{TEACHER}.inference.max_num_batched_tokens"}


def test_several_teachers_drop_the_one_of_the_yaml() -> None:
    """verl drops the entry `teacher_model` beside others; each has its own engines."""
    teachers = "distillation.teacher_models"
    values = {**TAUGHT, f"{teachers}.math.model_path": "qwen2.5-7b", f"{teachers}.code.model_path": "qwen2.5-14b"}
    inference = {"name": "vllm", "tensor_model_parallel_size": 2, "gpu_memory_utilization": 0.6}
    for name in ("math", "code"):
        values |= {f"{teachers}.{name}.num_replicas": 1}
        values |= {f"{teachers}.{name}.inference.{key}": value for key, value in inference.items()}
    shares = [
        knob.key for knob in read_problem(values).knobs if knob.key.startswith("distillation") and "util" in knob.key
    ]

    assert shares == [
        f"{teachers}.math.inference.gpu_memory_utilization",
        f"{teachers}.code.inference.gpu_memory_utilization",
    ]


# -- what is asked ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "gpus", "key", "fitting"),
    [
        (ENGINE, 1, f"{REWARD}.rollout.tensor_model_parallel_size", 1),
        ({**APART, f"{REWARD}.rollout.tensor_model_parallel_size": 8}, 8, f"{REWARD}.rollout.tensor_model_parallel_size", 4),
        ({**TAUGHT, "distillation.n_gpus_per_node": 1}, 8, f"{TEACHER}.inference.tensor_model_parallel_size", 1),
        ({**TAUGHT, "distillation.n_gpus_per_node": 6}, 8, f"{TEACHER}.inference.tensor_model_parallel_size", None),
    ],
)  # fmt: skip
def test_an_engines_size_divides_its_pool(values: dict[str, Any], gpus: int, key: str, fitting: int | None) -> None:
    """verl's default of 2 does not start on one GPU."""
    problem = read_problem({**values, "trainer.n_gpus_per_node": gpus})

    assert {change.key: change.new for change in problem.fixes}.get(key) == fitting


@pytest.mark.parametrize(
    ("values", "version", "error", "said"),
    [
        ({"reward_model.enable": True}, "0.9.1", NotModelled, "reward.reward_model.enable=true"),
        ({**OWN, "reward_model.strategy": "megatron"}, "0.5.0", NotModelled, "reward_model.strategy=fsdp"),
        ({**OWN, "reward_model.enable_resource_pool": True}, "0.6.1", NotModelled, "enable_resource_pool=false"),
        ({**ENGINE, f"{REWARD}.model_path": None}, "0.9.1", ConfigError, "memfit.models.reward=qwen2.5-7b"),
        ({**ENGINE, f"{REWARD}.rollout.name": "trtllm"}, "0.9.1", NotModelled, f"{REWARD}.rollout.name=vllm"),
        ({**APART, f"{REWARD}.nnodes": 0}, "0.9.1", ConfigError, f"{REWARD}.nnodes=1"),
        ({**TAUGHT, "distillation.nnodes": 0}, "0.9.1", ConfigError, "distillation.nnodes=1"),
        ({**TAUGHT, "distillation.distillation_loss.loss_mode": "forward_kl_topk"}, "0.9.1", NotModelled, "loss_mode=k3"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_named(
    values: dict[str, Any], version: str, error: type[MemfitError], said: str
) -> None:
    """Each says the key and a way out."""
    with pytest.raises(error, match=said):
        estimate(values, version=version)


def _only_the_policy(path: str) -> ModelSpec:
    if path in ("qwen2.5-7b", "qwen2.5-14b"):
        return load_model(path)
    raise ModelNotFound(f"{path} was not found.")


def test_an_architecture_can_be_named() -> None:
    """memfit.models.reward stands for a path that tells nothing; the message of the refusal says so."""
    values = {**ENGINE, f"{REWARD}.model_path": "/checkpoints/rm-17"}
    with pytest.raises(
        ModelNotFound, match=r"reward.reward_model.model_path: /checkpoints/rm-17 .* memfit.models.reward="
    ):
        estimate(values, resolve=_only_the_policy)
    named = estimate(values, resolve=_only_the_policy, models={"reward": "qwen2.5-14b"})

    assert named.phase("generate").engine.weights == load_model("qwen2.5-14b").parameters + 1


@pytest.mark.parametrize("values", [ENGINE, APART, TAUGHT], ids=["guest", "pool", "teacher"])
def test_every_knob_of_another_model_is_writable(values: dict[str, Any]) -> None:
    """Nothing else of another model is ever written."""
    keys = {knob.key for knob in read_problem(values).knobs if not knob.key.startswith((ARR, "data", "critic"))}

    assert len(keys) == 3 and keys <= WRITABLE_KEYS


@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_without_them_nothing_is_read(version: str) -> None:
    """verl's own defaults enable neither reward model nor teacher, whatever sizes stand in their sections."""
    problem = read_problem({}, version=version)

    assert "generate" not in {phase.name for phase in problem.estimate({}).phases}
    assert not any(knob.key.startswith(("reward", "distillation")) for knob in problem.knobs)


# -- the real verl --------------------------------------------------------------------------------------------------
LAUNCHED = [
    *(("own", OWN, version) for version in IN_TRAINER),
    *(("guest", ENGINE, version) for version in IN_ENGINE),
    *(("pool", APART, version) for version in IN_ENGINE),
    *(("teacher", TAUGHT, version) for version in ("0.8.0", "0.9.1")),
]


@pytest.mark.verl
@pytest.mark.parametrize(("name", "values", "version"), LAUNCHED, ids=[f"{name}-{v}" for name, _, v in LAUNCHED])
def test_the_real_config_is_planned(name: str, values: dict[str, Any], version: str) -> None:
    """verl's own yaml, composed by Hydra with the hook: the installed release's checks pass, and its dataclasses are built."""
    asked = {**values, f"{ARR}.rollout.name": "vllm", "algorithm.adv_estimator": "grpo", f"{ARR}.rollout.n": 8}
    if name != "own":
        asked |= {f"{ARR}.actor.use_dynamic_bsz": True}
    asked |= dict.fromkeys(
        (SHARE,) if name in ("guest", "pool") else (TEACHERS_SHARE,) if name == "teacher" else (), 0.95
    )
    extra = ["+model=qwen2.5-7b", "+hardware=a100-80", f"memfit.framework_version={version}", "memfit.report=off"]
    job = Job(
        config_dir=str(package(version) / "trainer" / "config"),
        words=words(asked) + extra,
        validate=version == "0.9.1",
    )
    [done] = compose_jobs([job])

    assert done.error == ""
    assert done.resolved["data"]["train_batch_size"] == 1024
    if name == "guest":
        assert done.resolved["reward"]["reward_model"]["rollout"]["gpu_memory_utilization"] < 0.95
    if name == "teacher" and version == "0.9.1":
        assert _built(done.resolved["distillation"]).teacher_models["default"].num_replicas == 2


def _built(section: dict[str, Any]) -> Any:
    """verl's own dataclass of a planned section."""
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(OmegaConf.create(section))

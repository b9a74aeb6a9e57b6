"""verl launches whose rollout engines have GPUs of their own: who holds what, in which pool, and what may be written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NotModelled
from hydra_plugins.memfit.compose import hook
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks.verl import defaults, recipes
from hydra_plugins.memfit.frameworks.verl.adapter import VerlAdapter
from hydra_plugins.memfit.frameworks.verl.placement import STANDALONE_FRACTION, Placement, read_placement
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.resolve import load as load_model
from hydra_plugins.memfit.planning.problem import SOLVE, Plan
from hydra_plugins.memfit.planning.search import check, make_plan
from support.verl_defaults import as_text, extract_recipes
from support.verl_problem import ARR, read_problem
from support.verl_wheels import package

MIB, GIB = 1 << 20, 1 << 30
SHARE, BUCKET = (
    f"{ARR}.rollout.gpu_memory_utilization",
    f"{ARR}.rollout.checkpoint_engine.update_weights_bucket_megabytes",
)
ASYNC = {
    "async_training.require_batches": 4,
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 4,
    "data.train_batch_size": 0,
    f"{ARR}.actor.ppo_mini_batch_size": 32,
    f"{ARR}.hybrid_engine": False,
    f"{ARR}.rollout.n": 16,
}
ONE_STEP = {"rollout.nnodes": 2, "rollout.n_gpus_per_node": 2, f"{ARR}.hybrid_engine": False}
SEPARATE = {
    "trainer.v1.trainer_mode": "separate_async",
    f"{ARR}.rollout.nnodes": 1,
    f"{ARR}.rollout.n_gpus_per_node": 4,
    f"{ARR}.rollout.checkpoint_engine.backend": "nccl",
}
RELEASES = ("0.7.1", "0.8.0", "0.9.1")


def estimate(values: dict[str, Any], **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(read_problem(values, **options)).estimate


def planned(values: dict[str, Any], **options: Any) -> Plan:
    """The plan for the launch."""
    problem = read_problem(values, **options)
    return make_plan(problem, options.get("pinned", ()))


@pytest.mark.parametrize(
    ("values", "version", "expected"),
    [
        ({}, "0.9.1", Placement()),
        (ASYNC, "0.7.1", Placement(entry="fully_async", hybrid=False, gpus_per_node=4, nodes=1)),
        (ONE_STEP, "0.8.0", Placement(entry="one_step_off", hybrid=False, gpus_per_node=2, nodes=2)),
        (SEPARATE, "0.9.1", Placement(entry="separate_async", hybrid=True, gpus_per_node=4, nodes=1)),
        ({**SEPARATE, f"{ARR}.hybrid_engine": False}, "0.9.1",
         Placement(entry="separate_async", hybrid=False, gpus_per_node=4, nodes=1)),
        ({**SEPARATE, "trainer.use_v1": False}, "0.9.1", Placement()),
        ({**ASYNC, "async_training.use_trainer_do_validate": True, STANDALONE_FRACTION: 0.8}, "0.9.1",
         Placement(entry="fully_async", gpus_per_node=4, nodes=1, share_key=STANDALONE_FRACTION)),
    ],
)  # fmt: skip
def test_a_placement_is_read_from_its_own_keys(values: dict[str, Any], version: str, expected: Placement) -> None:
    """The recipes are told apart by the sections that only their yaml has, 0.9's own trainer by its mode."""
    config = plain_defaults(version, values)

    assert read_placement(View(config), version) == expected


def plain_defaults(version: str, values: dict[str, Any]) -> Any:
    """The embedded config of the launch, resolved."""
    from omegaconf import OmegaConf

    config = OmegaConf.create(dict(VerlAdapter().defaults_with(version, values)))
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return plain(config)


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("values", [ASYNC, ONE_STEP], ids=["fully_async", "one_step_off"])
def test_no_gpu_holds_both(version: str, values: dict[str, Any]) -> None:
    """The trainer's phases are without an engine, the rollout without model states."""
    phases = {phase.name: phase for phase in estimate(values, version=version).phases}

    assert {"launch", "rollout", "update_actor", "optimizer_step", "weight_sync"} == set(phases)
    assert phases["update_actor"].engine.total_bytes == phases["optimizer_step"].engine.total_bytes == 0
    assert phases["rollout"].engine.kv_cache > 0
    assert phases["rollout"].trainer.total_bytes == phases["rollout"].trainer.context


@pytest.mark.parametrize(
    ("version", "engine", "free_cache", "holds_kv"),
    [
        ("0.7.1", "vllm", True, True), ("0.8.0", "vllm", True, True), ("0.9.1", "vllm", True, False),
        ("0.9.1", "vllm", False, True), ("0.7.1", "sglang", True, False), ("0.8.0", "sglang", False, True),
    ],
)  # fmt: skip
def test_the_pool_gives_up_its_cache_where_verl_does(
    version: str, engine: str, free_cache: bool, holds_kv: bool
) -> None:
    """While weights arrive vLLM keeps its KV pool before 0.9, and any engine does with free_cache_engine=false."""
    values = {**ASYNC, f"{ARR}.rollout.name": engine, f"{ARR}.rollout.free_cache_engine": free_cache, SHARE: 0.8}
    sync = estimate(values, version=version).phase("weight_sync")

    assert (sync.engine.kv_cache > 0) == holds_kv


@pytest.mark.parametrize(
    ("version", "bucket", "buffers"),
    [
        ("0.9.1", 2048, 3 * 2048 * MIB + 4 * 152064 * 3584),  # Qwen2.5-7B's embedding in fp32 is larger than a bucket
        ("0.9.1", 4096, 3 * 4096 * MIB),
        ("0.8.0", 2048, 3 * 2048 * MIB),  # in bf16 it is not
        ("0.8.0", 512, 3 * 512 * MIB + 2 * 152064 * 3584),
    ],
)
def test_a_receiver_holds_three_buckets(version: str, bucket: int, buffers: int) -> None:
    """Two of the broadcast, one shared with the engine, and the tensor that has to be put together."""
    values = {**ASYNC, f"{ARR}.rollout.free_cache_engine": False, SHARE: 0.7, BUCKET: bucket}

    assert estimate(values, version=version).phase("weight_sync").trainer.communication_buffers == buffers


def test_a_sender_holds_two_buckets_beside_what_it_gathers() -> None:
    """FSDP2 gathers one tensor at a time: two copies of the embedding in fp32."""
    values = {**ASYNC, f"{ARR}.actor.strategy": "fsdp2", SHARE: 0.3, f"{ARR}.actor.ppo_max_token_len_per_gpu": 9000}
    sync = estimate({**values, f"{ARR}.actor.fsdp_config.param_offload": True}, hardware="h200").phase("weight_sync")

    assert sync.trainer.communication_buffers == 2 * 2048 * MIB + 2 * 4 * 152064 * 3584
    assert sync.trainer.weights == -(-4 * load_model("qwen2.5-7b").parameters // 8)


def test_the_worst_gpu_of_either_pool_decides() -> None:
    """A share without room for the buckets fails in the rollout pool; a budget too large, and what it leaves, in the trainer."""
    greedy = estimate({**ASYNC, SHARE: 0.97}, version="0.8.0")
    heavy = estimate({**ASYNC, f"{ARR}.actor.ppo_max_token_len_per_gpu": 400000, f"{ARR}.rollout.n": 2000})

    assert [phase.name for phase in greedy.phases if not phase.fits] == ["launch", "rollout", "weight_sync"]
    assert [phase.name for phase in heavy.phases if not phase.fits] == ["update_actor", "weight_sync"]


def test_both_pools_are_planned() -> None:
    """The engine's share and the trainer's token budget are written, each for its own GPUs; nothing is learned otherwise."""
    asked = {SHARE: 0.97, f"{ARR}.actor.ppo_max_token_len_per_gpu": 400000, f"{ARR}.rollout.n": 2000}
    plan = planned({**ASYNC, **asked}, version="0.8.0")
    changed = {change.key: change.new for change in plan.changes}

    assert plan.fits and plan.trains_the_same
    assert 0.6 < float(str(changed[SHARE])) < 0.95
    assert 1024 <= int(str(changed[f"{ARR}.actor.ppo_max_token_len_per_gpu"])) < 400000


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_share_is_chosen_for_a_gpu_without_a_trainer(share: float) -> None:
    """The solved share of the pool is larger than that of GPUs which it would share with the trainer."""
    pool = read_problem({**ASYNC, SHARE: share}, goal="fast").estimate({SHARE: SOLVE})
    shared = read_problem({SHARE: share}, goal="fast").estimate({SHARE: SOLVE})

    assert pool.fits
    assert dict(pool.solved)[SHARE] >= dict(shared.solved)[SHARE]


@pytest.mark.parametrize(
    ("values", "key"),
    [(SEPARATE, SHARE), ({**ASYNC, "async_training.use_trainer_do_validate": True}, SHARE)],
    ids=["separate_async", "fully_async"],
)
def test_one_key_for_two_pools_is_the_smaller_share(values: dict[str, Any], key: str) -> None:
    """Where engines sleep beside the trainer too, the share that they leave room for holds in the pool as well."""
    problem = read_problem({**values, key: 0.9})
    solved = problem.estimate({key: SOLVE})

    assert dict(solved.solved)[key] < 0.9
    assert solved.phase("kv_resume").trainer.weights > 0
    assert [knob.key for knob in problem.knobs].count(key) == 1


def test_the_pools_own_share_is_a_knob_of_its_own() -> None:
    """0.9's fully asynchronous trainer has a second key for it; each is turned for its own GPUs."""
    values = {**ASYNC, "async_training.use_trainer_do_validate": True, SHARE: 0.9, STANDALONE_FRACTION: 0.99}
    plan = planned(values)
    changed = {change.key: float(str(change.new)) for change in plan.changes if "memory_utilization" in change.key}

    assert plan.fits
    assert changed[SHARE] < changed[STANDALONE_FRACTION] < 0.99


def test_an_asynchronous_engine_has_16_prompts_in_flight() -> None:
    """verl 0.9 lets 16 prompts of n samples run on one engine; a larger cache than they fill is of no use."""
    ladder = {knob.key: knob.candidates for knob in read_problem({**ASYNC, f"{ARR}.rollout.max_num_seqs": 1024}).knobs}
    fewer = {"async_training.concurrent_samples_per_replica": 4, f"{ARR}.rollout.max_num_seqs": 1024}
    smaller = {knob.key: knob.candidates for knob in read_problem({**ASYNC, **fewer}).knobs}

    assert ladder[f"{ARR}.rollout.max_num_seqs"] == (256,)
    assert smaller[f"{ARR}.rollout.max_num_seqs"] == (64,)


def test_an_update_waits_for_its_batches() -> None:
    """require_batches sets the batch of the log-probabilities; the update goes through one mini-batch after the other."""
    values = {**ASYNC, f"{ARR}.actor.use_dynamic_bsz": False, "algorithm.rollout_correction.bypass_mode": False}
    values |= {f"{ARR}.actor.ppo_micro_batch_size_per_gpu": 8, f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu": 1000}
    problem = read_problem({**values, "async_training.require_batches": 1})
    more = read_problem(values)

    assert more.estimate({}).phase("old_log_prob").peak_bytes > problem.estimate({}).phase("old_log_prob").peak_bytes
    assert more.estimate({}).phase("update_actor").peak_bytes == problem.estimate({}).phase("update_actor").peak_bytes


@pytest.mark.parametrize(
    ("pool", "asked", "fitting"),
    [((2, 2), 4, None), ((1, 6), 4, 2), ((1, 2), 4, 2)],
)
def test_the_engines_size_divides_its_own_pool(pool: tuple[int, int], asked: int, fitting: int | None) -> None:
    """The trainer's 8 GPUs say nothing about a pool of 6."""
    values = {**ONE_STEP, "rollout.nnodes": pool[0], "rollout.n_gpus_per_node": pool[1]}
    key = f"{ARR}.rollout.tensor_model_parallel_size"
    fixes = {change.key: change.new for change in read_problem({**values, key: asked}).fixes}

    assert fixes.get(key) == fitting


@pytest.mark.parametrize(
    ("values", "version", "said"),
    [
        ({**ASYNC, "data.train_batch_size": 64}, "0.9.1", "data.train_batch_size=0"),
        ({**ASYNC, "data.gen_batch_size": 8}, "0.9.1", "data.gen_batch_size=1"),
        ({**ASYNC, f"{ARR}.hybrid_engine": True}, "0.8.0", f"{ARR}.hybrid_engine=false"),
        ({**ONE_STEP, f"{ARR}.rollout.checkpoint_engine.backend": "naive"}, "0.9.1", "backend=nccl"),
        ({**SEPARATE, "data.train_batch_size": 1000}, "0.9.1", "data.train_batch_size=1024"),
        ({**ASYNC, BUCKET: 1024}, "0.7.1", f"{BUCKET}=1040"),
    ],
)
def test_what_verl_asserts_is_said_before_it_starts(values: dict[str, Any], version: str, said: str) -> None:
    """Each blocker names the key and the value that verl wants."""
    assert any(said in blocker for blocker in read_problem(values, version=version).blockers)


def test_a_bucket_that_verl_needs_is_not_made_smaller() -> None:
    """0.7 cannot split the embedding of a 7B model, 1040 MiB in bf16; 0.8 can."""
    sizes = {v: [k.candidates for k in read_problem(ASYNC, version=v).knobs if k.key == BUCKET] for v in RELEASES}

    assert sizes == {"0.7.1": [], "0.8.0": [(1024, 512, 256)], "0.9.1": [(1024, 512, 256)]}


def test_the_published_values_have_no_blocker() -> None:
    """The launches of these tests are ones that verl starts."""
    launches = [(ASYNC, "0.8.0"), (ONE_STEP, "0.8.0"), (ASYNC, "0.9.1"), (SEPARATE, "0.9.1")]

    assert [read_problem(values, version=version).blockers for values, version in launches] == [(), (), (), ()]


@pytest.mark.parametrize(
    ("values", "version", "error", "said"),
    [
        (ASYNC, "0.6.1", NotModelled, "fully_async_policy in verl 0.6.1"),
        ({**ASYNC, f"{ARR}.model.lora_rank": 16}, "0.9.1", NotModelled, "lora.merge=true"),
        ({**ONE_STEP, "rollout.nnodes": 0}, "0.9.1", ConfigError, "rollout.nnodes=1"),
        ({**SEPARATE, f"{ARR}.rollout.nnodes": 0}, "0.9.1", ConfigError, f"{ARR}.rollout.nnodes=1"),
    ],
)
def test_what_is_not_modelled_is_refused(
    values: dict[str, Any], version: str, error: type[MemfitError], said: str
) -> None:
    """The reason is named, and the override that helps."""
    with pytest.raises(error, match=said):
        estimate(values, version=version)


@pytest.mark.parametrize(
    ("name", "version", "error", "said"),
    [
        ("hf", "0.4.1", NotModelled, "inside the trainer"),
        ("hf", "0.9.1", ConfigError, "verl 0.9.1 has no such rollout; it has sglang, trtllm, vllm"),
        ("trtllm", "0.9.1", NotModelled, "TensorRT-LLM"),
        ("trtllm", "0.5.0", ConfigError, "it has hf, sglang, vllm"),
        ("naive", "0.5.0", ConfigError, "rollout.name=vllm"),
    ],
)
def test_other_rollouts_are_refused_by_name(name: str, version: str, error: type[MemfitError], said: str) -> None:
    """One that the release has is not modelled, with the reason; one that it lacks is an error in the launch."""
    with pytest.raises(error, match=said):
        estimate({f"{ARR}.rollout.name": name}, version=version)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("async_training.staleness_threshold", RELEASES),
        ("async_training.concurrent_samples_per_replica", ("0.9.1",)),
        ("rollout.nnodes", RELEASES),
        ("rollout.nodes", ()),
    ],
)
def test_the_recipes_keys_are_known(key: str, known: tuple[str, ...]) -> None:
    """The console refuses a misspelt key of a recipe, and says which releases have the right one."""
    assert VerlAdapter().versions_with(key) == known


@pytest.mark.verl
def test_the_embedded_recipes_are_those_of_the_wheels() -> None:
    """recipes.json is what the wheels say, byte for byte."""
    record = extract_recipes({version: package(version) for version in defaults.VERSIONS})

    assert as_text(record) == (defaults.DATA / "recipes.json").read_text(encoding="utf-8")


@pytest.mark.verl
@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_the_real_recipe_is_planned(recipe: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own file, composed by Hydra with the hook, gets a plan for both pools; batch and pools stay."""
    monkeypatch.setenv(hook.REPORTED, "")
    root = package(version)
    values = {**(ASYNC if recipe == recipes.FULLY_ASYNC else ONE_STEP), SHARE: 0.99}
    words = [f"{key}={value}" for key, value in values.items()]
    words += [f"{ARR}.rollout.name=vllm", f"{ARR}.actor.use_dynamic_bsz=true", "algorithm.adv_estimator=grpo"]
    words += [f"hydra.searchpath=[file://{root / 'trainer' / 'config'}]"]
    settings = ["+model=qwen2.5-7b", "+hardware=a100-80", f"memfit.framework_version={version}", "memfit.report=off"]
    name = f"{recipe}_ppo_trainer"
    directory: Path = root / "experimental" / f"{recipe}_policy" / "config"
    with contextlib.chdir(root.parent), initialize_config_dir(str(directory), version_base=None):
        config: Any = plain(compose(name, overrides=[*words, *settings]))

    assert 0.5 < config[ARR]["rollout"]["gpu_memory_utilization"] < 0.99
    assert config["rollout"]["n_gpus_per_node"] == values["rollout.n_gpus_per_node"]
    assert "memfit" not in config

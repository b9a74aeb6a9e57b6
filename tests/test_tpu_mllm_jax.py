"""The adapter of MLLM-JAX's GRPO runner: its keys at both ends of its history, its rules, and what a plan may change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NoPlanFits, NotModelled
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.mllm_jax import keys
from hydra_plugins.memfit.frameworks.mllm_jax.batch import bucket, split
from hydra_plugins.memfit.frameworks.xla import Slice, read_mesh
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Plan, Problem
from hydra_plugins.memfit.planning.search import check, make_plan
from support.tpu_models import model

SWEEP = {"BATCH_SIZE": 1, "NUM_PRE_Q": 8, "GLOBAL_LENGTH": 2048, "MAX_LENGTH_SAMPLE": 64}
TWO_HOSTS = Slice(hosts=2, per_host=4)


def nested(batch: int = 2, n: int = 8, prompt: int = 2048, sample: int = 64, **more: Any) -> dict[str, Any]:
    """Return a config of the newest layout; ``train`` and ``mesh_shape`` may be given."""
    rollout = {"batch_size": batch, "n": n, "global_length": prompt, "max_length_sample": sample}
    return {"rollout": rollout, "mesh_shape": "1,-1,1", **more}


def problem(config: dict[str, Any], hardware: str = "v4-16", name: str = "qwen2.5-7b", **settings: Any) -> Problem:
    """Return the adapter's problem; ``environ`` is the environment of the launch."""
    environ = settings.pop("environ", {})
    context = Context(
        hardware=catalog.load(hardware),
        settings=Settings(**settings),
        resolve_model=lambda _: model(name),
        environ=environ,
    )
    return registry.adapter("mllm-jax").problem(config, context)


def changed(plan: Plan) -> dict[str, Any]:
    """Return what the plan sets, by key."""
    return {change.key: change.new for change in plan.changes}


def test_sweep_commit_has_no_neutral_knob() -> None:
    """At the sweep's commit nothing splits a batch: the launch is refused, said why, and shown what would fit."""
    with pytest.raises(NoPlanFits) as caught:
        make_plan(problem(SWEEP))
    plan = caught.value.plan  # type: ignore[attr-defined]
    assert plan.changes == ()
    assert [(c.key, c.new, c.kind) for c in plan.proposals] == [("NUM_PRE_Q", 4, "semantic")]
    assert "memfit.allow_semantic=true" in str(caught.value)
    assert any("has no key that splits a batch" in warning for warning in plan.warnings)


def test_sweep_commit_with_leave_to_change_training() -> None:
    """With memfit.allow_semantic the completions go down to what is known to fit, marked as semantic."""
    plan = make_plan(problem(SWEEP, allow_semantic=True))
    assert changed(plan) == {"NUM_PRE_Q": 4}
    assert not plan.trains_the_same


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SWEEP | {"TRAIN_MICRO_BATCH_SIZE": 8}, {"TRAIN_MICRO_BATCH_SIZE": 4}),
        (nested(train={"micro_batch_size": 8, "micro_batch_size_per_device": None}), {"train.micro_batch_size": 4}),
        (nested(train={"micro_batch_size_per_device": 2}), {"train.micro_batch_size_per_device": 1}),
        (
            nested(batch=4, train={"micro_batch_size_per_device": 4}, mesh_shape="auto"),
            {"mesh_shape": "1,-1,1", "train.micro_batch_size_per_device": 1},
        ),
    ],
    ids=["variable", "of a process", "of a device", "a replica a host"],
)
def test_micro_batches_are_spent_where_the_runner_has_them(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """From 821fe33 on smaller micro-batches make it fit, and NUM_PRE_Q keeps its 8."""
    plan = make_plan(problem(config))
    assert changed(plan) == expected
    assert plan.trains_the_same


def test_goal_fast_takes_the_largest_micro_batch_that_fits() -> None:
    """With memfit.goal=fast the micro-batch grows as far as it fits; without it what fits is kept."""
    config = nested(batch=32, n=8, prompt=512, sample=64, train={"micro_batch_size_per_device": 1})
    found = problem(config, goal="fast")
    new = changed(make_plan(found))["train.micro_batch_size_per_device"]
    assert new > 1
    assert not found.estimate({"train.micro_batch_size_per_device": 2 * new}).fits
    assert make_plan(problem(config)).changes == ()


def test_what_fits_is_left_alone() -> None:
    """A launch that fits is not changed."""
    assert make_plan(problem(SWEEP | {"NUM_PRE_Q": 4})).changes == ()


@pytest.mark.parametrize(
    ("config", "version"),
    [
        (SWEEP, keys.SWEEP),
        ({"batch_size": 1, "num_pre_q": 8, "global_length": 512}, keys.SWEEP),
        (SWEEP | {"TRAIN_MICRO_BATCH_SIZE": 4}, keys.SPLIT),
        (nested(train={"micro_batch_size_per_device": 1}), keys.NEWEST),
    ],
)
def test_keys_tell_the_version(config: dict[str, Any], version: str) -> None:
    """Upper-case, flat and nested keys are recognised, and belong to a commit of the runner."""
    assert registry.recognise(config).name == "mllm-jax"
    assert problem(config).framework_version == version


@pytest.mark.parametrize(
    "config",
    [{}, {"trainer": {}, "data": {}}, {"train": {"micro_batch_size": 4}}, {"batch_size": 4}, {"rollout": {"n": 8}}],
)
def test_other_apps_are_not_claimed(config: dict[str, Any]) -> None:
    """Keys that other runners have too do not make a config MLLM-JAX's."""
    assert not registry.adapter("mllm-jax").recognises(config)


def test_environment_wins_over_flat_yaml() -> None:
    """At the sweep's commit a variable beats the YAML, and the plan says so."""
    found = problem(
        {"batch_size": 1, "num_pre_q": 4, "global_length": 2048, "max_length_sample": 64}, environ={"NUM_PRE_Q": "8"}
    )
    assert not check(found).fits
    assert any("NUM_PRE_Q=8 in the environment wins over num_pre_q=4" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 128), (64, 128), (128, 128), (129, 256), (480, 512), (2048, 2048), (2049, 4096)]
)
def test_buckets(tokens: int, size: int) -> None:
    """Prompt and response are padded to the runner's buckets."""
    assert bucket(tokens, "GLOBAL_LENGTH") == size


@pytest.mark.parametrize(
    ("config", "local", "rollout", "update", "accumulates", "tokens"),
    [
        (SWEEP, 8, 2, 2, False, 2176),
        (SWEEP | {"NUM_PRE_Q": 3}, 4, 1, 1, False, 2176),
        (SWEEP | {"GRAD_ACCUM_STEPS": 4}, 8, 2, 2, True, 2176),
        (SWEEP | {"NUM_PRE_Q": 0}, 8, 2, 2, False, 2176),
        (nested(batch=16, train={"micro_batch_size_per_device": 4}), 64, 16, 4, True, 2176),
        (nested(batch=3, n=2, train={"micro_batch_size_per_device": 1}), 4, 1, 1, False, 2176),
        (nested(batch=16, n=8, prompt=512, sample=1024), 64, 16, 4, True, 1536),
    ],
)
def test_what_a_device_sees(
    config: dict[str, Any], local: int, rollout: int, update: int, accumulates: bool, tokens: int
) -> None:
    """Local batch, padding to the devices, micro-batches and the accumulation buffer follow the runner's rules."""
    batch = split(keys.read(config, {}, None), TWO_HOSTS)
    assert (batch.local, batch.rollout_per_device, batch.update_per_device) == (local, rollout, update)
    assert (batch.accumulates, batch.tokens) == (accumulates, tokens)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (SWEEP | {"NUM_PRE_Q": "many"}, "NUM_PRE_Q is 'many'; it must be a whole number above 0, e.g. NUM_PRE_Q=8"),
        (SWEEP | {"NUM_PRE_Q": -8}, "NUM_PRE_Q is -8"),
        (SWEEP | {"BETA": "x"}, "BETA is 'x'; it must be a number"),
        (SWEEP | {"BATCH_SIZE": 5, "NUM_PRE_Q": 3}, "Use NUM_PRE_Q=4"),
        (SWEEP | {"GLOBAL_LENGTH": 9000}, "GLOBAL_LENGTH=9000 is above the runner's largest bucket"),
        (SWEEP | {"MESH_SHAPE_FSDP": "1,3,1"}, "has 3 places for 8 devices"),
        (nested(train={"micro_batch_size_per_device": 3}), "Use train.micro_batch_size_per_device=2"),
        (nested(), "Use train.micro_batch_size_per_device=2"),
        (nested(train={"micro_batch_size": 6, "micro_batch_size_per_device": None}), "Use train.micro_batch_size=4"),
        (
            nested(train={"micro_batch_size": 4, "micro_batch_size_per_device": 2}),
            "contradict each other on 4 devices",
        ),
        (nested() | {"rollout": {"prompt_batch_size": 16, "global_length": 512}}, "the SID runner"),
        (nested(train={"optimizer": {"name": "adafactor"}}), "train.optimizer.name=adafactor is not modelled"),
    ],
)
def test_refusals_say_the_fix(config: dict[str, Any], text: str) -> None:
    """What the runner would refuse, or memfit does not model, is one clear error before anything is planned."""
    with pytest.raises(MemfitError) as caught:
        check(problem(config))
    assert isinstance(caught.value, (ConfigError, NotModelled))
    assert text in str(caught.value)


def test_newest_ignores_variables() -> None:
    """Variables given to the newest commit, which ignores them, are an error and not a silent default."""
    with pytest.raises(ConfigError, match="ignores BATCH_SIZE"):
        problem(SWEEP, framework_version=keys.NEWEST)


def test_gpu_is_not_modelled() -> None:
    """The runner on a GPU is refused: the formulas are the TPU compiler's."""
    with pytest.raises(NotModelled, match="TPU slices only"):
        problem(SWEEP, hardware="h100")


@pytest.mark.parametrize(
    ("text", "mesh"),
    [("1,-1,1", (1, 8, 1)), ("2,-1,1", (2, 4, 1)), ("1,4,2", (1, 4, 2)), ("auto", (2, 4, 1)), (" -1 ,4,1", (2, 4, 1))],
)
def test_meshes(text: str, mesh: tuple[int, int, int]) -> None:
    """A mesh is three sizes with one rest, or auto: a copy of the state a host."""
    assert read_mesh(text, "mesh_shape", TWO_HOSTS) == mesh


def test_inert_accumulation_is_said() -> None:
    """GRAD_ACCUM_STEPS splits nothing at the sweep's commit and costs a buffer: the plan says it."""
    found = problem(SWEEP | {"GRAD_ACCUM_STEPS": 4})
    assert any("splits nothing" in warning for warning in found.warnings)
    assert check(found).estimate.phase("train_step").trainer.gradients > 0


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("NUM_PRE_Q", True),
        ("NUM_PREQ", False),
        ("WANDB_NAME", True),
        ("rollout.n", True),
        ("rollout.batch_sizes", False),
        ("train.ppo_epochs", True),
        ("algo.name", True),
    ],
)
def test_misspelt_keys(key: str, known: bool) -> None:
    """A misspelt variable, or a near miss of a key that decides memory, belongs to no version."""
    adapter = registry.adapter("mllm-jax")
    assert bool(adapter.versions_with(key)) is known  # type: ignore[attr-defined]


@pytest.mark.parametrize(("completions", "status"), [(4, 0), (8, 3)])
def test_console_judges_the_sweep(completions: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """`memfit check` gives the boundary of the sweep as exit status and JSON, phases and components summed."""
    words = [f"{name}={value}" for name, value in (SWEEP | {"NUM_PRE_Q": completions}).items()]
    assert main(["check", "--framework", "mllm-jax", "--hardware", "v4-16", "--json", *words]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is (status == 0)
    assert [phase["name"] for phase in found["phases"]] == ["rollout", "train_step"]
    for phase in found["phases"]:
        assert sum(phase["components"].values()) == sum(phase["processes"].values()) == phase["peak_bytes"]


def test_console_refuses_to_compile_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """`--compile` on a GPU launch is an error and not a silent no."""
    words = ["data.train_batch_size=64", "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct"]
    assert main(["check", "--compile", "--framework", "verl", "--hardware", "h200", "--gpus", "1", *words]) == 2
    assert "h200 is a GPU" in capsys.readouterr().err


def test_hopeless_launch_is_not_compiled() -> None:
    """With memfit.exact a step that no squeezing can save is refused at once, without the compiler, and said so."""
    config = nested(batch=16, n=8, prompt=512, sample=1024, train={"micro_batch_size_per_device": 16})
    found = check(problem(config, hardware="v6e-8", exact=True))
    assert not found.fits
    assert any("it was not asked" in warning for warning in found.warnings)

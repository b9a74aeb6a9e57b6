"""Launches of the real verl with ``+hardware=``: what its task runner receives, in every supported version."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.frameworks.verl import defaults
from support import verl_launch
from support.verl_launch import Job, compose_jobs, environment, resolve_elsewhere, seed, words
from support.verl_model import checkpoint_without_weights
from support.verl_wheels import package

pytestmark = pytest.mark.verl

INSTALLED = "0.9.1"
LAUNCHES = [
    ("gspo-3b-h200", "micro-batch-32"),
    ("gspo-3b-h200", "micro-batch-unset"),
    ("grpo-4x80gb", "7b"),
    ("grpo-4x80gb", "3b"),
]
CASES = [(name, reading, version) for name, reading in LAUNCHES for version in defaults.VERSIONS]


def hardware_words(name: str, version: str = INSTALLED) -> list[str]:
    """Return what a user appends; a version that is not installed has to be named."""
    return [f"+hardware={name}"] + [f"memfit.framework_version={version}"] * (version != INSTALLED)


def launch(name: str, reading: str, version: str = INSTALLED, extra: Sequence[str] = (), **environ: str) -> Job:
    """Return one seed's launch on its own hardware, against the config of one version."""
    return Job(
        config_dir=str(package(version) / "trainer" / "config"),
        words=words(seed(name).values(reading)) + hardware_words(seed(name).hardware, version) + [*extra],
        environ=environ,
    )


def launch_without_memfit(case: tuple[str, str, str]) -> Job:
    """Return the same launch with nothing of memfit on the line."""
    job = launch(*case)
    kept = [word for word in job.words if not word.startswith(("+hardware=", "memfit."))]
    return Job(config_dir=job.config_dir, words=kept)


@cache
def planned() -> dict[tuple[str, str, str], verl_launch.Composed]:
    """Compose every launch with its hardware group, in one process with memfit."""
    return dict(zip(CASES, compose_jobs([launch(*case) for case in CASES]), strict=True))


@cache
def untouched() -> dict[tuple[str, str, str], verl_launch.Composed]:
    """Compose every launch without a hardware group, in one process without memfit."""
    return dict(zip(CASES, compose_jobs([launch_without_memfit(case) for case in CASES], memfit=False), strict=True))


@cache
def elsewhere() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Resolve the pickled configs in a process without memfit."""
    failed = {case: done.error for case, done in planned().items() if done.error}
    assert not failed, failed
    return dict(zip(planned(), resolve_elsewhere([done.pickled for done in planned().values()]), strict=True))


def select(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; an empty container is a leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


every_plan = pytest.mark.parametrize("case", CASES, ids="/".join)


@every_plan
def test_what_is_learned_is_unchanged(case: tuple[str, str, str]) -> None:
    """Batch, mini-batch, samples and lengths reach the worker as they were asked for."""
    origin = seed(case[0])
    asked = origin.values(case[1])

    kept = {key: select(elsewhere()[case], key) for key in origin.unchanged}

    assert kept == {key: asked[key] for key in origin.unchanged}


@every_plan
def test_nothing_of_memfit_reaches_a_worker(case: tuple[str, str, str]) -> None:
    """The shipped config resolves where memfit does not exist, holds plain values, and has no node of memfit."""
    config = elsewhere()[case]

    assert "memfit" not in config
    assert "hardware" not in config
    assert "memfit" not in planned()[case].yaml
    plain = (int, float, bool, str, type(None), list, dict)
    assert [key for key, value in leaves(config) if type(value) not in plain] == []


@every_plan
def test_only_keys_that_the_version_has(case: tuple[str, str, str]) -> None:
    """A key that the version's yaml does not have is a field of its dataclasses, or an argument of the engine."""
    before = set(dict(leaves(untouched()[case].resolved)))

    new = {key for key, _ in leaves(elsewhere()[case])} - before

    assert {key for key in new if ".engine_kwargs." not in key} <= set(defaults.dataclass_only(case[2]))


@pytest.mark.parametrize(
    ("pin", "value"),
    [
        ("actor_rollout_ref.rollout.gpu_memory_utilization", 0.35),
        ("actor_rollout_ref.actor.fsdp_config.param_offload", False),
        ("actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu", 1),
    ],
)
def test_a_value_after_the_group_stands(pin: str, value: Any) -> None:
    """What the user types after ``+hardware=`` is never changed; the plan is built around it."""
    [done] = compose_jobs([launch("gspo-3b-h200", "micro-batch-32", extra=words({pin: value}))])

    assert done.error == ""
    assert select(done.resolved, pin) == value


def test_without_a_hardware_group_no_byte_differs() -> None:
    """The same launches compose to the same bytes whether memfit is in reach or not."""
    with_memfit = compose_jobs([launch_without_memfit(case) for case in CASES])

    assert [done.error for done in with_memfit] == [""] * len(CASES)
    assert [done.yaml for done in with_memfit] == [done.yaml for done in untouched().values()]


def test_the_comparison_is_with_a_process_that_lacks_memfit() -> None:
    """Without memfit ``+hardware=h200`` is an ordinary value to Hydra: the test above can fail."""
    [done] = compose_jobs([launch("gspo-3b-h200", "micro-batch-32")], memfit=False)

    assert done.resolved["hardware"] == "h200"


def test_auto_answers_from_the_environment() -> None:
    """On a host without a GPU, ``+hardware=auto`` plans for MEMFIT_HARDWARE as the named group does."""
    job = launch("gspo-3b-h200", "micro-batch-32")
    auto = Job(
        config_dir=job.config_dir,
        words=["+hardware=auto" if word.startswith("+hardware=") else word for word in job.words],
        environ={"MEMFIT_HARDWARE": "h200"},
    )

    [done] = compose_jobs([auto])

    assert done.error == ""
    assert done.yaml == planned()[("gspo-3b-h200", "micro-batch-32", INSTALLED)].yaml


def test_auto_without_an_accelerator_says_what_to_do() -> None:
    """On a host without a GPU and without MEMFIT_HARDWARE the launch stops and names both ways out."""
    job = launch("gspo-3b-h200", "micro-batch-32")
    auto = Job(
        config_dir=job.config_dir,
        words=["+hardware=auto" if word.startswith("+hardware=") else word for word in job.words],
        environ={"CUDA_VISIBLE_DEVICES": ""},
    )
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this host has a GPU")

    [done] = compose_jobs([auto])

    assert "MEMFIT_HARDWARE" in done.error


def test_expandable_segments_stop_a_strict_launch() -> None:
    """An allocator setting that the rollout engine refuses is an error before anything is started."""
    conf = "expandable_segments:True"
    strict = launch("gspo-3b-h200", "micro-batch-32", "0.8.0", PYTORCH_CUDA_ALLOC_CONF=conf)
    loose = launch("gspo-3b-h200", "micro-batch-32", "0.8.0", ["memfit.strict=false"], PYTORCH_CUDA_ALLOC_CONF=conf)

    stopped, started = compose_jobs([strict, loose])

    assert "PYTORCH_CUDA_ALLOC_CONF" in stopped.error
    assert started.error == ""


UNMODELLED = {
    "actor_rollout_ref.actor.strategy": "veomni",
    "actor_rollout_ref.rollout.name": "hf",
    "actor_rollout_ref.model.mtp.enable": True,
}


@pytest.mark.parametrize("key", UNMODELLED)
def test_an_unmodelled_launch_stops_unless_told_otherwise(key: str) -> None:
    """What memfit cannot judge is refused with the key; with ``memfit.strict=false`` it composes as it was."""
    extra = words({key: UNMODELLED[key]})
    strict = launch("gspo-3b-h200", "micro-batch-32")
    strict = Job(config_dir=strict.config_dir, words=extra + [w for w in strict.words if not w.startswith(f"{key}=")])
    loose = Job(config_dir=strict.config_dir, words=[*strict.words, "memfit.strict=false"])
    without = Job(config_dir=strict.config_dir, words=[w for w in strict.words if not w.startswith("+hardware=")])

    stopped, started, plain = compose_jobs([strict, loose, without])

    assert key in stopped.error
    assert (started.yaml, started.error) == (plain.yaml, "")


def test_composing_with_a_plan_stays_near_composing() -> None:
    """At most a tenth more calls of functions with ``+hardware=h200``, report included; processor time is printed."""
    case = ("gspo-3b-h200", "micro-batch-32", INSTALLED)
    length = "data.max_response_length="
    pairs = [  # no two plans are the same: a process remembers what it planned, and what it reported
        Job(
            config_dir=job.config_dir,
            words=[word.replace(f"{length}4096", f"{length}{4096 + number}") for word in job.words],
            count=number > 15,
        )
        for number in range(1, 17)
        for job in (launch_without_memfit(case), launch(*case))
    ]
    done = compose_jobs(pairs)
    assert not any(one.error for one in done)

    timed = done[2:-2]  # the first pair pays for the imports, the last is counted
    without, planned_too = (1000 * median(one.seconds for one in timed[start::2]) for start in (0, 1))
    calls = [one.calls for one in done[-2:]]
    print(f"compose {without:.0f} ms, with a plan {planned_too:.0f} ms, ratio {planned_too / without:.3f}")
    print(f"compose {calls[0]} calls, with a plan {calls[1]} calls, ratio {calls[1] / calls[0]:.3f}")
    assert planned_too <= 1.3 * without
    assert 0 < calls[0] < calls[1] <= 1.10 * calls[0]


# The real entry point and Ray


RAY_WORDS = ["ray_kwargs.ray_init.num_cpus=1", "+ray_kwargs.ray_init.include_dashboard=false"]


def run_verl(
    arguments: list[str], directory: Path, environ: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run a Python program of verl with memfit in reach and return what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=240, check=False, cwd=directory, env=environment(environ),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "reading"), [LAUNCHES[0], LAUNCHES[2]])
def test_main_ppo_prints_the_plan_as_its_config(name: str, reading: str, tmp_path: Path) -> None:
    """``python -m verl.trainer.main_ppo ... +hardware=X --cfg job`` prints the planned config and nothing of memfit."""
    job = launch(name, reading)

    done = run_verl(["-m", "verl.trainer.main_ppo", *job.words, "--cfg", "job"], tmp_path)

    assert done.returncode == 0, done.stderr[-3000:]
    assert OmegaConf.create(done.stdout) == OmegaConf.create(planned()[(name, reading, INSTALLED)].yaml)


def test_a_plan_adds_at_most_a_tenth_to_the_start_of_verl(tmp_path: Path) -> None:
    """Processor time of ``main_ppo ... --cfg job`` with and without ``+hardware=h200``: the lesser of two runs each."""
    case = ("gspo-3b-h200", "micro-batch-32", INSTALLED)
    jobs = (launch_without_memfit(case), launch(*case))

    def seconds(job: Job) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_verl(["-m", "verl.trainer.main_ppo", *job.words, "--cfg", "job"], tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr[-3000:]
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    runs = [[seconds(job) for job in jobs] for _ in range(2)]
    without, planned_too = (min(times) for times in zip(*runs, strict=True))

    ratio = planned_too / without
    print(f"verl starts in {without:.2f} s, with a plan in {planned_too:.2f} s, ratio {ratio:.3f}")
    assert ratio <= 1.10


def test_main_ppo_stops_when_the_pins_cannot_fit(tmp_path: Path) -> None:
    """A launch whose pinned values cannot fit ends with an error that names the pin, without a traceback."""
    pin = "actor_rollout_ref.rollout.gpu_memory_utilization"
    job = launch("gspo-3b-h200", "micro-batch-32", extra=[f"{pin}=0.99"])

    done = run_verl(["-m", "verl.trainer.main_ppo", *job.words, "--cfg", "job"], tmp_path)

    assert done.returncode != 0
    assert pin in done.stderr
    assert "Traceback" not in done.stderr


PROBED = {
    "gspo": ("gspo-3b-h200", "micro-batch-32", "3b", []),
    "gspo-unset": ("gspo-3b-h200", "micro-batch-unset", "3b", []),
    "grpo": ("grpo-4x80gb", "7b", "7b", []),
    "ppo-with-critic": (
        "grpo-4x80gb", "7b", "7b",
        ["algorithm.adv_estimator=gae", "critic.ppo_micro_batch_size_per_gpu=8"],
    ),
}  # fmt: skip


@pytest.fixture(params=PROBED, scope="module")
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Start verl up to its task runner, which runs in a Ray worker without memfit; return what the runner saw."""
    name, reading, shape, more = PROBED[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = checkpoint_without_weights(directory / "checkpoint", shape)
    paths = words({"actor_rollout_ref.model.path": checkpoint, "critic.model.path": checkpoint})
    hardware = hardware_words(seed(name).hardware)
    asked = [word for word in launch(name, reading).words if word not in hardware]
    out = directory / "seen.json"

    program = str(Path(verl_launch.__file__).with_name("verl_probe.py"))
    line = [program, *asked, *paths, *more, *RAY_WORDS, *hardware]
    done = run_verl(line, directory, {"VERL_PROBE_OUT": str(out)})

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return request.param, seen


def test_verl_accepts_the_plan_and_its_runner_builds_from_it(probed: tuple[str, dict[str, Any]]) -> None:
    """verl's validation, Ray, the resolution and the dataclasses all take the planned config, without memfit."""
    name, seen = probed

    assert seen["loaded"] == []
    assert "memfit" not in json.dumps(seen["unresolved"])
    built = {"actor": "FSDPActorConfig", "rollout": "RolloutConfig", "model": "HFModelConfig"}
    if seen["resolved"]["actor_rollout_ref"]["actor"]["use_kl_loss"]:
        built["ref"] = "FSDPActorConfig"
    if name == "ppo-with-critic":
        built["critic"] = "FSDPCriticConfig"
    assert seen["built"] == built


def test_the_runner_receives_what_was_asked(probed: tuple[str, dict[str, Any]]) -> None:
    """Batch, samples and lengths in the Ray worker are those of the command line; every micro-batch is set."""
    name, seen = probed
    origin, reading = seed(PROBED[name][0]), PROBED[name][1]
    config = seen["resolved"]

    assert {key: select(config, key) for key in origin.unchanged} == {
        key: origin.values(reading)[key] for key in origin.unchanged
    }
    actor, rollout = config["actor_rollout_ref"]["actor"], config["actor_rollout_ref"]["rollout"]
    assert actor["use_dynamic_bsz"] == rollout["log_prob_use_dynamic_bsz"]
    if not actor["use_dynamic_bsz"]:
        assert isinstance(actor["ppo_micro_batch_size_per_gpu"], int)
        assert isinstance(rollout["log_prob_micro_batch_size_per_gpu"], int)

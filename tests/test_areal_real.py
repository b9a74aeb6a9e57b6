"""The installed AReaL loads its own configs with ``+hardware=`` on the line, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.frameworks.areal import schema
from support.hydra_app import ROOT

pytestmark = pytest.mark.areal

COMMON = """
experiment_name: gsm8k
trial_name: trial0
seed: 1
tokenizer_path: ${actor.path}
cluster:
  n_nodes: 1
  n_gpus_per_node: GPUS
  fileroot: ROOT
  name_resolve: {type: nfs, nfs_record_root: ROOT/names}
train_dataset: {path: openai/gsm8k, type: DATA, batch_size: 8, max_length: 1024}
saver: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
evaluator: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
recover: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
stats_logger: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
actor:
  backend: fsdp:dHALF
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  path: MODEL
  gradient_checkpointing: false
  kl_ctl: 0.0
  mb_spec: {max_tokens_per_mb: 10240}
  optimizer: {type: adam, lr: 1.7e-5}
"""
SERVED = """
gconfig: {n_samples: 4, max_new_tokens: 1024}
rollout:
  backend: ENGINE:dHALF
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  max_concurrent_rollouts: 32
  consumer_batch_size: ${train_dataset.batch_size}
sglang: {model_path: "${actor.path}", random_seed: "${seed}", mem_fraction_static: 0.8}
vllm: {model: "${actor.path}", gpu_memory_utilization: 0.8}
"""
REFERENCE = """
ref:
  backend: ${actor.backend}
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  path: ${actor.path}
  mb_spec: {max_tokens_per_mb: 10240}
  optimizer: null
"""
PROGRAM = """
import json, sys
from dataclasses import asdict
from areal.api import cli_args
config, _ = cli_args.load_expr_config(sys.argv[2:], getattr(cli_args, sys.argv[1]))
print("CONFIG " + json.dumps(asdict(config), default=str, sort_keys=True))
"""
FIELDS = """
import dataclasses, json
from areal.api import cli_args
CLASSES = {
    "actor": ("PPOActorConfig", "DPOEngineConfig", "TrainEngineConfig"),
    "sglang": ("SGLangConfig",),
    "vllm": ("vLLMConfig",),
    "actor.fsdp": ("FSDPEngineConfig",),
    "actor.mb_spec": ("MicroBatchSpec",),
}
fields = {k: sorted({f.name for n in v for f in dataclasses.fields(getattr(cli_args, n))}) for k, v in CLASSES.items()}
print("FIELDS " + json.dumps(fields))
"""
SMALL, LARGE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"


def write(folder: Path, text: str, *, gpus: int, model: str, engine: str = "sglang", data: str = "rl") -> Path:
    """Write a config in the shape of AReaL's examples and return its path."""
    half = max(1, gpus // 2)
    for name, value in {"GPUS": gpus, "HALF": half, "MODEL": model, "ENGINE": engine, "DATA": data}.items():
        text = text.replace(name, str(value))
    path = folder / "run.yaml"
    path.write_text(text.replace("ROOT", str(folder / "root")), encoding="utf-8")
    return path


def run(code: str, *argv: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program beside the installed AReaL."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MEMFIT_")}
    variables |= {"PYTHONPATH": str(ROOT), **(environ or {})}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=300, env=variables
    )


def load(path: Path, *words: str, kind: str = "GRPOConfig", environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what AReaL's own loader makes of the config; nothing less than its dataclass."""
    done = run(PROGRAM, kind, "--config", str(path), *words, environ=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CONFIG "))
    loaded: dict[str, Any] = json.loads(line.removeprefix("CONFIG "))
    return loaded


def differences(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """Return dotted key -> new value of what differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, Any] = {}
        for key in before.keys() | after.keys():
            found |= differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        return found
    return {} if (type(before), before) == (type(after), after) else {path: after}


@pytest.mark.parametrize(("hardware", "environ"), [("a40", {}), ("h200", {}), ("auto", {"MEMFIT_HARDWARE": "a40"})])
def test_the_dataclass_carries_the_plan(tmp_path: Path, hardware: str, environ: dict[str, str]) -> None:
    """On one GPU the weights must go through files; only keys that memfit may write differ, with AReaL's own types."""
    from hydra_plugins.memfit.frameworks.areal.knobs import WRITABLE_KEYS

    path = write(tmp_path, COMMON + SERVED, gpus=1, model=SMALL)
    before = load(path)
    changed = differences(before, load(path, f"+hardware={hardware}", environ=environ))

    assert changed["actor.weight_update_mode"] == "disk"
    assert set(changed) <= WRITABLE_KEYS
    if hardware != "h200":
        assert 0 < changed["sglang.mem_fraction_static"] < 0.8


def test_the_config_that_areal_saves_is_read_beside_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`memfit diagnose` of a log needs nothing else: the saved config is the launch, with what ran in it."""
    load(write(tmp_path, COMMON + SERVED, gpus=2, model=SMALL), "actor.mb_spec.max_tokens_per_mb=8192")
    (saved,) = tmp_path.rglob("config.yaml")
    log = saved.with_name("trainer.log")
    log.write_text(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 44.42 GiB of "
        "which 1.00 GiB is free.\n",
        encoding="utf-8",
    )
    assert main(["diagnose", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["launch"], found["plan"]["framework_version"]) == ("config.yaml beside the log", "1.0.4")
    assert found["hardware"] == "a40"


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_separate_gpus_get_a_plan_for_the_trainer(tmp_path: Path, engine: str) -> None:
    """A 7B model that is too large for its four trainers: the plan is in the dataclass, and ints are ints."""
    path = write(tmp_path, COMMON + SERVED, gpus=8, model=LARGE, engine=engine)
    changed = differences(load(path), load(path, "+hardware=h800"))

    assert changed
    tokens = changed.get("actor.mb_spec.max_tokens_per_mb", 2048)
    assert isinstance(tokens, int) and tokens >= 2048
    assert not any(key.startswith(("ref", "critic")) for key in changed)


def test_a_reference_that_stands_in_the_config_is_planned(tmp_path: Path) -> None:
    """With a KL term the reference counts; only its own section may be written."""
    path = write(tmp_path, (COMMON + SERVED + REFERENCE).replace("kl_ctl: 0.0", "kl_ctl: 0.1"), gpus=8, model=LARGE)
    loaded = load(path, "+hardware=h800")

    assert loaded["ref"]["experiment_name"] == "gsm8k"
    assert loaded["critic"] is None


def test_supervised_training_has_no_server(tmp_path: Path) -> None:
    """SFTConfig refuses keys of a rollout: nothing of a server is written."""
    path = write(tmp_path, COMMON.replace("  kl_ctl: 0.0\n", ""), gpus=2, model=LARGE, data="sft")
    changed = differences(load(path, kind="SFTConfig"), load(path, "+hardware=h200", kind="SFTConfig"))

    assert all(key.startswith("actor.") for key in changed)


def test_words_behind_the_group_are_pinned(tmp_path: Path) -> None:
    """The order on the line decides, also under AReaL's own loader."""
    path = write(tmp_path, COMMON + SERVED, gpus=1, model=SMALL)
    loaded = load(path, "+hardware=a40", "sglang.mem_fraction_static=0.7")

    assert loaded["sglang"]["mem_fraction_static"] == 0.7
    assert loaded["train_dataset"]["batch_size"] == 8
    assert loaded["gconfig"]["max_new_tokens"] == 1024


def test_every_process_of_a_launch_gets_the_same_plan(tmp_path: Path) -> None:
    """Launcher, server and ranks see other devices and each adds words of its own: the planned values are the same."""
    path = write(tmp_path, COMMON + SERVED, gpus=1, model=SMALL)
    plans = [
        load(path, "+hardware=auto", *words, environ={"MEMFIT_HARDWARE": "a40", "CUDA_VISIBLE_DEVICES": devices})
        for words, devices in (((), "0"), (("sglang.random_seed=3",), "1"), ((), ""))
    ]
    for plan in plans:
        plan["sglang"]["random_seed"] = 0

    assert plans[0] == plans[1] == plans[2]


def test_a_launch_that_cannot_fit_stops_before_training(tmp_path: Path) -> None:
    """A 7B model in fp32 does not fit one A40 beside its server: the reason is said, and no config is handed out."""
    path = write(tmp_path, COMMON + SERVED, gpus=1, model=LARGE)
    done = run(PROGRAM, "GRPOConfig", "--config", str(path), "+hardware=a40", "memfit.pin=[actor.fsdp.offload_params]")

    assert done.returncode != 0
    assert "CONFIG" not in done.stdout
    assert "memfit" in done.stderr


def test_the_embedded_schema_is_the_installed_one() -> None:
    """What is embedded as 1.0.4 has exactly the fields of the installed dataclasses."""
    done = run(FIELDS)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FIELDS "))
    for section, installed in json.loads(line.removeprefix("FIELDS ")).items():
        below = [key.removeprefix(f"{section}.") for key in schema.keys("1.0.4") if key.startswith(f"{section}.")]
        assert sorted(key for key in below if "." not in key) == installed

"""A launch that has already run, read from its log or from beside it: for `memfit diagnose` and `memfit learn` alike."""

from __future__ import annotations

import json
import pprint
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.learning import store

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
WORDS = (
    "algorithm.adv_estimator=grpo actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct "
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4 {ROLLOUT}.log_prob_micro_batch_size_per_gpu=4 {ROLLOUT}.name=vllm "
    "trainer.n_gpus_per_node=8"
)
READINGS = "".join(f"(TaskRunner pid=7) step:{step} - perf/max_memory_reserved_gb:21.{step}\n" for step in (1, 2, 3))
AREAL = {
    "experiment_name": "gsm8k",
    "cluster": {"n_nodes": 1, "n_gpus_per_node": 2},
    "train_dataset": {"path": "openai/gsm8k", "batch_size": 8, "max_length": 1024},
    "gconfig": {"n_samples": 4, "max_new_tokens": 1024},
    "rollout": {"backend": "sglang:d1", "max_concurrent_rollouts": 32},
    "actor": {
        "backend": "fsdp:d1",
        "path": "Qwen/Qwen2.5-7B-Instruct",
        "optimizer_dtype": "float32",
        "mb_spec": {"max_tokens_per_mb": 10240},
    },
    "sglang": {"mem_fraction_static": 0.8},
}


def oom(capacity: str, asked: str = "1.00") -> str:
    """Return the traceback of an update that ran out of memory on a device of a capacity in GiB."""
    return (
        '(WorkerDict pid=4)   File "fsdp_workers.py", line 504, in update_actor\n(WorkerDict pid=4) torch.OutOfMemoryError: '
        f"CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total capacity of {capacity} GiB of which 0.50 GiB "
        "is free.\n"
    )


def printed(version: str) -> str:
    """Return verl's composed config as its runner prints it."""
    config: dict[str, Any] = json.loads(json.dumps(registry.adapter("verl").defaults(version)))
    for word in WORDS.split():
        (*sections, key), value = word.split("=")[0].split("."), yaml.safe_load(word.split("=")[1])
        node = config
        for section in sections:
            node = node[section]
        node[key] = value
    return "".join(f"(TaskRunner pid=7) {line}\n" for line in pprint.pformat(config).splitlines())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the store of an empty desk, on which no driver and no variable answers."""
    monkeypatch.setenv("MEMFIT_STORE", str(tmp_path / "store.sqlite3"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEMFIT_HARDWARE", raising=False)
    return tmp_path / "store.sqlite3"


@pytest.mark.parametrize("version", ["0.7.1"])
def test_a_log_that_shows_its_launch_is_learned_from(version: str, kept: Path, tmp_path: Path) -> None:
    """The config that verl printed tells release and launch; the same run with the launch typed out is the same lesson."""
    log = tmp_path / "console.log"
    log.write_text(printed(version) + READINGS, encoding="utf-8")
    assert main(["learn", str(log), "--hardware", "h200"]) == 0
    [shown] = store.read(kept)
    typed = ["--framework", "verl", "--framework-version", version, *WORDS.split()]
    assert main(["learn", str(log), "--hardware", "h200", *typed]) == 0
    [same] = store.read(kept)
    assert (shown.kind, shown.predicted, shown.observed) == (same.kind, same.predicted, same.observed)
    assert shown.alike["framework"] == f"verl {version[:3]}"


def test_a_death_is_learned_from_its_log_alone(kept: Path, tmp_path: Path) -> None:
    """Where one product alone has the capacity that the message names, nothing else has to be said."""
    log = tmp_path / "console.log"
    log.write_text(printed("0.9.1") + oom("139.72"), encoding="utf-8")
    assert main(["learn", str(log)]) == 0
    [seen] = store.read(kept)
    assert (seen.outcome, seen.phase, seen.alike["hardware"]) == ("oom", "update_actor", "h200")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (READINGS, (), "does not show its launch, and no .hydra/memfit.json is given"),
        (printed("0.9.1") + oom("79.15"), (), "--hardware NAME says which"),
        (f"+ python3 -m verl.trainer.main_ppo {WORDS} +hardware=h200\n{READINGS}", (), "memfit planned this launch"),
        (printed("0.9.1") + READINGS, ("--hardware", "h20x"), "unknown hardware 'h20x'"),
    ],
    ids=["no launch", "several products", "planned", "hardware"],
)
def test_what_a_log_does_not_tell_is_asked_for(
    text: str, words: tuple[str, ...], message: str, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is learned of a launch, a device or a plan that would have to be guessed."""
    log = tmp_path / "console.log"
    log.write_text(text, encoding="utf-8")
    assert main(["learn", str(log), *words]) == 2
    assert message in capsys.readouterr().err
    assert store.read(kept) == []


def diagnosed(capsys: pytest.CaptureFixture[str], log: Path, *words: str) -> Any:
    """Return the JSON of a diagnosis that finds a cause."""
    assert main(["diagnose", str(log), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("line", ["", "+ python3 -m areal.launcher.local x.py --config y.yaml a=1\n"])
def test_the_config_that_areal_saved_beside_its_log_is_the_launch(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AReaL prints no config but saves it among its logs: its values are those that ran."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(AREAL), encoding="utf-8")
    log = tmp_path / "trainer.log"
    log.write_text(line + oom("44.42"), encoding="utf-8")
    found = diagnosed(capsys, log)
    assert (found["launch"], found["hardware"]) == ("config.yaml beside the log", "a40")
    assert found["plan"]["framework"] == "areal"


@pytest.mark.parametrize("text", ["a: [", "services: {web: {image: x}}\n", "root:x:0:0\n"])
def test_another_file_of_that_name_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.yaml that is none of AReaL's is no error of the user and no launch."""
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    log = tmp_path / "trainer.log"
    log.write_text(oom("44.42"), encoding="utf-8")
    found = diagnosed(capsys, log)
    assert found["launch"] is None or found["launch"] == ""
    assert any("does not show its launch" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("group", "words", "hardware"), [("auto", (), "h200"), ("auto", ("--hardware", "h20"), "h20"), ("a40", (), "a40")]
)
def test_the_device_of_the_log_answers_for_auto(
    group: str, words: tuple[str, ...], hardware: str, tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A logged `+hardware=auto` meant the machine of the log, not this one; what memfit had planned there is asked for."""
    log = tmp_path / "console.log"
    log.write_text(f"+ python3 -m verl.trainer.main_ppo {WORDS} +hardware={group}\n{oom('139.72')}", encoding="utf-8")
    found = diagnosed(capsys, log, *words)
    assert found["hardware"] == hardware
    assert any("--config .hydra/config.yaml" in note for note in found["notes"])

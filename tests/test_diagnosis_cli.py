"""`memfit diagnose` as it is typed."""

from __future__ import annotations

import gzip
import io
import json
import pprint
import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.frameworks import registry

LOGS = Path(__file__).parent / "data" / "logs"
MESSAGE = (
    "(WorkerDict pid={pid}) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total "
    "capacity of 79.15 GiB of which {free} GiB is free.\n"
)
WORDS = (
    "algorithm.adv_estimator=grpo data.train_batch_size=256 data.max_prompt_length=1024 data.max_response_length=4096 "
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct actor_rollout_ref.rollout.n=8 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 "
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 actor_rollout_ref.rollout.gpu_memory_utilization=0.6 "
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2 trainer.n_gpus_per_node=8 trainer.nnodes=1"
)
MICRO_BATCH = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"


def update_oom(asked: str = "23.20", free: str = "20.11") -> str:
    """Return the traceback of an update that ran out of memory."""
    return '(WorkerDict pid=4)   File "fsdp_workers.py", line 504, in update_actor\n' + MESSAGE.format(
        pid=4, asked=asked, free=free
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Return what the command prints on stdout, words by single blanks."""
    assert main(["diagnose", *arguments]) == status
    return " ".join(capsys.readouterr().out.split())


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the JSON of a diagnosis that finds a cause."""
    assert main(["diagnose", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log that shows its launch, by the command line that ``set -x`` prints."""
    path = tmp_path / "train.log"
    path.write_text(f"+ python3 -m verl.trainer.main_ppo {WORDS} 2>&1\n{update_oom()}", encoding="utf-8")
    return path


def test_the_failure_is_explained(capsys: pytest.CaptureFixture[str], log: Path) -> None:
    """Phase, tensor, device and what would have fitted, from the log alone."""
    text = said(capsys, str(log))
    for part in (
        "memfit: the GPU is out of memory, in update_actor",
        "23.20 GiB asked for",
        "23.20 GiB = 81920 tokens x 152064 x 2 B: one bf16 copy of the logits "
        f"({MICRO_BATCH}=16 x (prompt + response 5120))",
        "behind +hardware=a100-80 (the command line, line 1 of the log)",
        f"{MICRO_BATCH}=8",
    ):
        assert part in text


def test_what_would_have_fitted_fits(capsys: pytest.CaptureFixture[str], log: Path) -> None:
    """The overrides, pasted behind the launch, pass `memfit check` on the same hardware."""
    found = answer(capsys, str(log))
    words = ["--framework", "verl", "--hardware", found["hardware"], *WORDS.split(), *found["overrides"]]
    assert main(["check", *words]) == 0


def test_the_log_teaches_more_than_the_model_knows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A launch that memfit would have let through died: what it needed beyond the prediction is counted in the new plan."""
    words = WORDS.replace(f"{MICRO_BATCH}=16", f"{MICRO_BATCH}=4").replace(
        "log_prob_micro_batch_size_per_gpu=16", "log_prob_micro_batch_size_per_gpu=4"
    )
    assert main(["check", "--framework", "verl", "--hardware", "a100-80", *words.split()]) == 0
    capsys.readouterr()
    path = tmp_path / "log"
    path.write_text(f"+ python3 -m verl.trainer.main_ppo {words}\n{update_oom('5.80', '1.00')}", encoding="utf-8")
    found = answer(capsys, str(path))
    [update] = [phase for phase in found["plan"]["phases"] if phase["name"] == "update_actor"]
    assert found["learned_bytes"] > 0 and found["overrides"]
    assert update["components"]["fragmentation"] >= found["learned_bytes"] and update["fits"]
    assert update["peak_bytes"] < (79.15 - 1.00 + 5.80) * 2**30


def test_a_rollout_that_died_gets_a_smaller_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where the engine is awake its share is solved for with the lesson."""
    frame = '(WorkerDict pid=4)   File "fsdp_workers.py", line 504, in generate_sequences\n'
    path = tmp_path / "log"
    path.write_text(
        f"+ python3 -m verl.trainer.main_ppo {WORDS}\n{frame}{MESSAGE.format(pid=4, asked='4.00', free='0.50')}",
        encoding="utf-8",
    )
    found = answer(capsys, str(path))
    key = "actor_rollout_ref.rollout.gpu_memory_utilization="
    [share] = [word for word in found["overrides"] if word.startswith(key)]
    assert found["cause"]["phase"] == "rollout" and float(share.split("=")[1]) < 0.6


def test_the_public_areal_failure_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """48 MiB were one MLP projection of 5120 tokens; batch and lengths stay as they are."""
    words = (
        "actor.gradient_checkpointing=false sglang.mem_fraction_static=0.8 train_dataset.batch_size=8 "
        "gconfig.max_new_tokens=512 actor.mb_spec.max_tokens_per_mb=5120 rollout.max_concurrent_rollouts=32 "
        "allocation_mode=sglang.d1p1t1+d1p1t1"
    )
    options = ["--framework", "areal", "--gpus", "1", "--model", "qwen2.5-0.5b"]
    found = answer(capsys, str(LOGS / "areal-server-beside.log"), *options, *words.split())
    assert found["devices"][0] == found["hardware"] == "a40"
    assert found["terms"][0]["formula"] == "5120 tokens x 4864 x 2 B"
    assert found["cause"]["others"] == [{"pid": 1234, "bytes": round(36.34 * 2**30)}]
    assert [word.split("=")[0] for word in found["overrides"]] == ["sglang.mem_fraction_static"]
    assert all(change["kind"] == "neutral" for change in found["plan"]["changes"])


def test_a_printed_config_is_the_launch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """verl's printed config is read with the keys of the release that printed it."""
    config: dict[str, Any] = json.loads(json.dumps(registry.adapter("verl").defaults("0.6.1")))
    config["algorithm"]["adv_estimator"] = "grpo"
    config["data"] |= {"max_prompt_length": 1024, "max_response_length": 4096, "train_batch_size": 256}
    actor = config["actor_rollout_ref"]
    actor["model"]["path"] = "Qwen/Qwen2.5-7B-Instruct"
    actor["actor"] |= {"ppo_micro_batch_size_per_gpu": 16, "ppo_mini_batch_size": 64}
    actor["rollout"] |= {"log_prob_micro_batch_size_per_gpu": 16, "n": 8, "name": "vllm"}
    path = tmp_path / "log"
    printed = "".join(f"(TaskRunner pid=7) {line}\n" for line in pprint.pformat(config).splitlines())
    path.write_text(printed + update_oom(), encoding="utf-8")
    found = answer(capsys, str(path))
    assert found["launch"] == "the config that verl printed, line 1 of the log"
    assert found["plan"]["framework_version"] == "0.6.1"
    assert found["terms"][0]["formula"] == "81920 tokens x 152064 x 2 B"
    assert any(word.startswith(MICRO_BATCH) for word in found["overrides"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vllm-kv-too-small", ["one sequence of 262144 tokens was asked for, 34736 tokens fit", "Raise gpu_memory_utilization"]),
        ("vllm-free-memory", ["this engine starts with a share of 0.05 or less", "139.72 GiB on the device (h200)"]),
        ("shm-nccl", ["shared memory (/dev/shm) is full", "Not the GPU", "--shm-size"]),
        ("kernel-cgroup", ["a container or job used up its memory limit"]),
        ("nccl-timeout", ["said by 2 processes, among them rank 0, 2 messages", "No lack of memory by itself"]),
        ("expandable-segments", ["take expandable_segments:True out"]),
        ("torch-2.1", ["in pieces that are too small: fragmentation"]),
        ("slurm-oom-older", ["also line 2: a process was killed (SIGKILL) (a consequence, most likely)"]),
        ("xla-hbm-table", ["63.80 GiB asked for 30.75 GiB on the device", "2.00 GiB f32[32,4096,4096]"]),
    ],
)  # fmt: skip
def test_other_failures_say_what_helps(capsys: pytest.CaptureFixture[str], name: str, parts: list[str]) -> None:
    """What is no lack of GPU memory is told as that; without a launch the advice stands alone."""
    text = said(capsys, str(LOGS / f"{name}.log"))
    assert [part for part in parts if part not in text] == []


def test_the_memory_of_the_host_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ray's message names the memory of the host: what is offloaded must fit into it."""
    path = tmp_path / "log"
    path.write_text(
        "Memory on the node (IP: 10.0.0.1, ID: ab) where the task (task ID: cd, name=x, pid=1, memory used=9.05GB) was "
        "running was 119.41GB / 120.00GB (0.995), which exceeds the memory usage threshold of 0.95. Ray killed\n",
        encoding="utf-8",
    )
    words = f"{WORDS} actor_rollout_ref.actor.fsdp_config.optimizer_offload=true"
    found = answer(capsys, str(path), "--framework", "verl", "--hardware", "a100-80", *words.split())
    assert found["cause"]["sizes"] == {"used": round(119.41 * 2**30), "total": 120 << 30}
    assert found["plan"]["host"]["budget_bytes"] == 120 << 30
    assert bool(found["refusal"]) != bool(found["overrides"])


def test_exit_statuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """0 a cause was found, 3 none that is known, 2 the input is wrong; never a traceback."""
    fine = tmp_path / "fine.log"
    fine.write_text("step:1 - all is well\n", encoding="utf-8")
    assert said(capsys, str(fine), status=3).startswith("memfit: no known failure in")
    assert main(["diagnose", str(fine), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["cause"] is None
    for arguments in (
        [str(tmp_path / "none.log")],
        [str(tmp_path)],
        [str(LOGS / "torch-2.1.log"), "--config", "none.yaml"],
        [str(LOGS / "torch-2.1.log"), "--framework", "verl", "--hardware", "h100", "a.b=1"],
        [str(LOGS / "torch-2.1.log"), "--hardware", "h1000"],
        [str(LOGS / "torch-2.1.log"), "--framework", "verll"],
    ):
        assert main(["diagnose", *arguments]) == 2
        assert capsys.readouterr().err.startswith("memfit: ")


def test_stdin_and_gzip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` is stdin, and gzip is unpacked wherever it comes from."""
    packed = gzip.compress((LOGS / "vllm-free-memory.log").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(packed))))
    assert "promised more of the GPU than was free" in said(capsys, "-")


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (
            "python3 -m verl.trainer.main_ppo --config-path=/x --config-name=y a=1",
            "A config of your own is composed by Hydra",
        ),
        ("python3 -m areal.launcher.local x.py --config y.yaml a=1", "give it by --config FILE"),
        ("python3 -m verl.trainer.main_ppo no.such_key=1", "has no key no.such_key"),
        ("nothing", "does not show its launch"),
    ],
)
def test_a_launch_that_cannot_be_planned_is_a_note(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, note: str
) -> None:
    """The diagnosis stands where the launch in the log is not complete; what is missing is said."""
    path = tmp_path / "log"
    path.write_text(f"{line}\n{update_oom()}", encoding="utf-8")
    text = said(capsys, str(path))
    assert note in text and "in update_actor" in text


def test_a_failure_without_a_phase_teaches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where memfit predicts that the launch fits and the log does not tell the phase, no override is claimed to help."""
    path = tmp_path / "log"
    words = WORDS.replace("_per_gpu=16", "_per_gpu=4")
    path.write_text(
        f"+ python3 -m verl.trainer.main_ppo {words}\n{MESSAGE.format(pid=1, asked=1.5, free=1.0)}", encoding="utf-8"
    )
    found = answer(capsys, str(path))
    assert (found["explained"], found["overrides"], found["cause"]["phase"]) == (False, [], None)
    assert "memfit predicts that this launch fits" in said(capsys, str(path))


def test_a_log_cannot_redirect_memfit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of the variables in front of a logged command only those of the launch count: none says where models are looked up."""
    path = tmp_path / "log"
    front = f"HF_HUB_CACHE={tmp_path} HF_ENDPOINT=http://127.0.0.1:9 MEMFIT_HARDWARE=l4 PYTORCH_CUDA_ALLOC_CONF=x:1"
    path.write_text(f"+ {front} python3 -m verl.trainer.main_ppo {WORDS}\n{update_oom()}", encoding="utf-8")
    cached = tmp_path / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / "x"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}", encoding="utf-8")
    found = answer(capsys, str(path))
    assert found["plan"]["model"]["source"] == "conf/model/qwen2.5-7b.yaml"
    assert found["hardware"] == "a100-80"


def test_a_part_of_a_device_is_planned_for(capsys: pytest.CaptureFixture[str], log: Path) -> None:
    """The capacity of the message counts, also where the named product has more (a MIG slice), and that is said."""
    found = answer(capsys, str(log), "--hardware", "h200")
    assert found["plan"]["hardware"]["capacity_bytes"] == pytest.approx(79.15 * 2**30, rel=1e-3)
    assert "h200 has 139.70 GiB, and the message names 79.15 GiB: planned for 79.14 GiB." in found["notes"]

"""A sweep through hydra-submitit-launcher's local executor: where the plan is made, and that the job gets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_driver import A40, RTX4090, Driver

ROOT = Path(__file__).parents[1]
APP = """
import hydra, json, os, pathlib
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    said = {"pid": os.getpid(), "config": OmegaConf.to_container(config)}
    pathlib.Path(os.environ["TOLD"], f"{os.getpid()}.json").write_text(json.dumps(said))

main()
"""
CONFIG = """
model: {path: Qwen/Qwen2.5-7B-Instruct}
generation: {num_return_sequences: 64, max_prompt_length: 4096, max_new_tokens: 4096, chunk_size: null, micro_batch_size: null}
"""


def sweep(tmp_path: Path, driver: Driver, *words: str) -> tuple[int, list[dict[str, object]], str]:
    """Run the app through submitit; return the launcher's pid, what each job was given, and what was printed."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "config.yaml").write_text(CONFIG)
    told = tmp_path / "told"
    told.mkdir()
    command = [sys.executable, "app.py", "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2"]
    environ = {**driver.environ(tmp_path), "PYTHONPATH": str(ROOT), "TOLD": str(told)}
    run = subprocess.Popen(
        [*command, "+memfit.framework=transformers", *words],
        cwd=tmp_path,
        env={k: v for k, v in environ.items() if not k.startswith(("RAY_", "SLURM_"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    return run.pid, [json.loads(path.read_text()) for path in told.glob("*.json")], output


@pytest.mark.neighbours
def test_each_job_of_a_sweep_gets_the_plan_of_its_own_hardware(tmp_path: Path) -> None:
    """Jobs compose in processes of their own; each has plain values, no `memfit` node, and those of its accelerator."""
    launcher, jobs, _ = sweep(tmp_path, Driver(extra=("fail=nvmlInitWithFlags:9",)), "+hardware=rtx4090,a40")

    assert len(jobs) == 2 and launcher not in {job["pid"] for job in jobs}
    chunks = sorted(job["config"]["generation"]["chunk_size"] for job in jobs)  # type: ignore[index]
    assert 0 < chunks[0] < chunks[1]
    assert all("memfit" not in job["config"] for job in jobs)  # type: ignore[operator]


@pytest.mark.neighbours
def test_what_the_launcher_read_travels_with_the_environment(tmp_path: Path) -> None:
    """`+hardware=auto`: Hydra composes every job once where it is launched, and the job plans with that same reading."""
    _, (job,), output = sweep(tmp_path, Driver(gpus=(RTX4090, A40)), "+hardware=auto")

    assert "GPUs of several kinds" in output
    assert isinstance(job["config"]["generation"]["chunk_size"], int)  # type: ignore[index]
    logs = "".join(path.read_text() for path in tmp_path.rglob("*_log.err"))
    assert "rtx4090" in logs

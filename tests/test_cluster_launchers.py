"""Sweeps through submitit's local executor and through a Ray of this machine: where the plan is made, and that the job gets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_driver import A40, RTX4090, Driver

ROOT = Path(__file__).parents[1]
APP = """
import hydra, json, os, pathlib, uuid
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    said = {"pid": os.getpid(), "config": OmegaConf.to_container(config)}
    pathlib.Path(os.environ["TOLD"], f"{uuid.uuid4()}.json").write_text(json.dumps(said))

main()
"""
CONFIG = """
model: {path: Qwen/Qwen2.5-7B-Instruct}
generation: {num_return_sequences: 64, max_prompt_length: 4096, max_new_tokens: 4096, chunk_size: null, micro_batch_size: null}
"""


SUBMITIT = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2")
RAY = ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=1", "+hydra.launcher.ray.init.include_dashboard=false")


def sweep(
    tmp_path: Path, driver: Driver, *words: str, launcher: tuple[str, ...] = SUBMITIT
) -> tuple[int, list[dict[str, object]], str]:
    """Run the app through the launcher; return that process's pid, what each job was given, and what was printed."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "config.yaml").write_text(CONFIG)
    told = tmp_path / "told"
    told.mkdir()
    command = [sys.executable, "app.py", "-m", *launcher]
    environ = {**driver.environ(tmp_path), "PYTHONPATH": str(ROOT), "TOLD": str(told)}
    run = subprocess.Popen(
        [*command, "+memfit.framework=transformers", *words],
        cwd=tmp_path,
        env={k: v for k, v in environ.items() if not k.startswith(("RAY_", "SLURM_"))} | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    return run.pid, [json.loads(path.read_text()) for path in told.glob("*.json")], output


@pytest.mark.neighbours
@pytest.mark.parametrize("through", [SUBMITIT, RAY], ids=["submitit", "ray"])
def test_each_job_of_a_sweep_gets_the_plan_of_its_own_hardware(tmp_path: Path, through: tuple[str, ...]) -> None:
    """Jobs run in processes of their own; each has plain values, no `memfit` node, and those of its accelerator."""
    driver = Driver(extra=("fail=nvmlInitWithFlags:9",))
    launcher, jobs, _ = sweep(tmp_path, driver, "+hardware=rtx4090,a40", launcher=through)

    assert len(jobs) == 2 and launcher not in {job["pid"] for job in jobs}
    chunks = sorted(job["config"]["generation"]["chunk_size"] for job in jobs)  # type: ignore[index]
    assert 0 < chunks[0] < chunks[1]
    assert all("memfit" not in job["config"] for job in jobs)  # type: ignore[operator]


@pytest.mark.neighbours
def test_ray_jobs_get_the_plan_that_was_made_where_the_sweep_was_launched(tmp_path: Path) -> None:
    """`+hardware=auto` reads the launching machine: its panel is printed there, and a job gets finished values."""
    _, (job,), output = sweep(tmp_path, Driver(gpus=(A40,)), "+hardware=auto", launcher=RAY)

    composed, started = output.split("Started a local Ray instance")
    assert "on 1 x a40" in composed and "memfit:" not in started
    assert isinstance(job["config"]["generation"]["chunk_size"], int)  # type: ignore[index]


@pytest.mark.neighbours
def test_what_the_launcher_read_travels_with_the_environment(tmp_path: Path) -> None:
    """`+hardware=auto`: Hydra composes every job once where it is launched, and the job plans with that same reading."""
    _, (job,), output = sweep(tmp_path, Driver(gpus=(RTX4090, A40)), "+hardware=auto")

    assert "GPUs of several kinds" in output
    assert isinstance(job["config"]["generation"]["chunk_size"], int)  # type: ignore[index]
    logs = "".join(path.read_text() for path in tmp_path.rglob("*_log.err"))
    assert "rtx4090" in logs

"""The script that measures a GPU: it runs here on tiny models and says clearly where there is no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from measure.__main__ import main
from measure.page import summary
from measure.table import KINDS, TINY, Job, table

GIB = 1 << 30
MACHINE = {"device": "A GPU", "versions": {"torch": "2.13.0"}, "date": "2026-11-21"}


def test_every_kind_is_measured_for_real_and_dry() -> None:
    """Both tables hold every kind, and varied lengths with and without expandable segments."""
    for dry in (False, True):
        jobs = table(dry=dry)
        assert {job.kind for job in jobs} == set(KINDS)
        assert {job.expandable for job in jobs if job.kind == "lengths"} == {False, True}


def result(**more: Any) -> dict[str, Any]:
    """Return a result as a job reports it."""
    return {"kind": "training", "options": {"model": "m"}, **more}


@pytest.mark.parametrize(
    ("results", "line"),
    [
        (
            [
                result(
                    phases={"update": {"allocated": 2 * GIB, "reserved": 3 * GIB, "end": 0}},
                    predicted={"update": int(2.1 * GIB)},
                )
            ],
            "| training model=m | update | 2.100 | 2.000 | +5.00 % | 3.000 | 1.500 |",
        ),
        (
            [result(kind="context", options={}, outside_bytes={"first tensor": 500 << 20})],
            "| first tensor | 500 |",
        ),
        (
            [
                result(kind="lengths", lengths="dynamic", expandable=True, limit_bytes=1, multiple=m, survived=m > 1.03)
                for m in (1.1, 1.02, 1.04)
            ],
            "| lengths model=m | dynamic | yes | 1.04 |",
        ),
        ([result(error="OutOfMemoryError")], "- training model=m: `OutOfMemoryError`"),
    ],
)
def test_the_summary_shows_predicted_beside_measured(results: list[dict[str, Any]], line: str) -> None:
    """Each kind of result has its line, a failed job among them."""
    assert line in summary(MACHINE, results).splitlines()


@pytest.mark.verl
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No CUDA device: exit 2, one line that names the way out, and no file."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.verl
@pytest.mark.parametrize("job", [job for job in table(dry=True) if job.kind != "lengths"], ids=lambda job: job.kind)
def test_each_job_runs_on_a_tiny_model(job: Job) -> None:
    """Phases come back with what was allocated at their peak, not less than what is left at their end."""
    from measure.jobs import run

    found = run(job, "cpu")
    for phase in found.get("phases", {}).values():
        assert 0 < phase["end"] <= phase["allocated"] <= phase["reserved"]
    if job.kind == "training":
        assert list(found["phases"])[1:] == ["update", "optimizer_step"]


@pytest.mark.verl
def test_steps_of_varied_lengths_die_below_what_their_tensors_take() -> None:
    """A limit below the live peak fails, a generous one does not."""
    from measure.jobs import run

    job = Job(kind="lengths", options={**TINY, "tokens": 16}, lengths="dynamic", expandable=True)
    free = run(job, "cpu")
    live = free["phases"]["steps"]["allocated"]
    assert free["survived"]
    assert not run(replace(job, limit_bytes=int(0.9 * live)), "cpu")["survived"]


@pytest.mark.verl
def test_the_command_writes_raw_numbers_and_a_summary(tmp_path: Path) -> None:
    """A dry run of one kind leaves a JSON file with versions, and a page."""
    assert main(["--dry-run", "--only", "generation", "--out", str(tmp_path)]) == 0
    (raw,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    stored = json.loads(raw.read_text())
    assert stored["machine"]["versions"]["torch"] != "not installed"
    assert [r["kind"] for r in stored["results"]] == ["generation"]
    assert "| generation model=tiny-llama" in page.read_text()

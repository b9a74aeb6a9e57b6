"""memfit installed in three ways beside four versions of Hydra: found, working, and out of the way when unused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.hydra_app import BATCH, HYDRA, LAUNCH, ROOT, Ran, run, write_app

pytestmark = pytest.mark.matrix

MODES = ("wheel", "sdist", "editable")
SOURCES = ("hydra_plugins", "conf", "docs", "pyproject.toml", "README.md", "LICENSE")
PROBE = ROOT / "tests" / "support" / "hydra_probe.py"
SCAN_MS = 2.0
"""What the scan of an unused memfit may cost, in milliseconds of processor time: the least of three processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One version of Hydra with memfit installed in one way."""

    python: Path
    mode: str
    conf: Path
    app: Path
    before: str
    """What the plain application composed before memfit was installed."""

    def run(self, *words: str | Path) -> Ran:
        """Run the verl-like application, or a given script, with the installed memfit."""
        return run(words, python=self.python, path=None)

    def probe(self, *words: str) -> dict[str, Any]:
        """Run `hydra_probe` in the environment of the cell."""
        ran = self.run(PROBE, *words)
        assert ran.code == 0, ran.err
        answer: dict[str, Any] = json.loads(ran.out)
        return answer


def pip(python: Path, *words: str) -> None:
    """Run pip for an environment that needs none of its own; what it says is shown when it fails."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "-q", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two applications: ``plain``, and ``verl`` with verl's own config."""
    folder = tmp_path_factory.mktemp("matrix")
    write_app(folder / "plain", {"a": {"b": 1, "c": "${a.b}"}, "hardware": "mine"})
    write_app(folder / "verl")
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """Return a copy of what memfit is built from, so that nothing is found in the checkout by chance."""
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        origin = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        _ = shutil.copytree(origin, copy / name, ignore=ignore) if origin.is_dir() else shutil.copy(origin, copy / name)
    return copy


@pytest.fixture(scope="module", params=list(HYDRA))
def python(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Return the interpreter of an environment with one version of Hydra, the build backend, and no memfit."""
    environment = folder / f"env-{request.param}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    interpreter = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip(interpreter, "install", *HYDRA[request.param], "rich", "nvidia-ml-py", "hatchling", "editables")
    return interpreter


@pytest.fixture(scope="module")
def before(python: Path, folder: Path) -> str:
    """Return the config of the plain application as this Hydra composes it where memfit is not installed."""
    ran = run([PROBE, "unused", str(folder / "plain" / "conf")], python=python, path=None)
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert "MemfitSearchPathPlugin" not in answer["plugins"]
    return str(answer["composed"])


@pytest.fixture(scope="module", params=MODES)
def cell(request: pytest.FixtureRequest, python: Path, before: str, source: Path, folder: Path) -> Iterator[Cell]:
    """Install memfit in one way, and take it away again."""
    if request.param == "editable":
        target = ["-e", str(source)]
    else:
        dist = folder / "dist"
        target = [str(_built(python, source, dist, request.param))]
    pip(python, "install", "--no-deps", "--no-build-isolation", *target)
    yield Cell(
        python=python,
        mode=request.param,
        conf=folder / "verl" / "conf",
        app=folder / "verl" / "app.py",
        before=before,
    )
    pip(python, "uninstall", "-y", "memfit")


def _built(python: Path, source: Path, dist: Path, kind: str) -> Path:
    """Return the wheel or the sdist, built once for all cells."""
    pattern = "memfit-*.whl" if kind == "wheel" else "memfit-*.tar.gz"
    if not list(dist.glob(pattern)):
        command = [str(python), "-m", "hatchling", "build", "-t", kind, "-d", str(dist)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    (built,) = dist.glob(pattern)
    return built


def test_unused_it_is_out_of_the_way(cell: Cell, folder: Path) -> None:
    """Found by Hydra; an application that does not use it composes the same bytes, imports nothing, loses no time."""
    answers = [cell.probe("unused", str(folder / "plain" / "conf")) for _ in range(3)]

    answer = answers[0]
    assert answer["plugins"].count("MemfitSearchPathPlugin") == 1
    assert answer["composed"] == cell.before
    assert answer["heavy"] == []
    assert [room for room in answer["rooms"] if not room.endswith((".searchpath", ".base", ".base.paths"))] == []
    assert min(a["scan_ms"] for a in answers) <= SCAN_MS, [a["scan_ms"] for a in answers]


def test_the_test_of_the_imports_can_fail(cell: Cell, folder: Path) -> None:
    """A heavy module that is imported is seen."""
    assert cell.probe("unused", str(folder / "plain" / "conf"), "--import-rich")["heavy"] == ["rich"]


def test_compose_plans(cell: Cell) -> None:
    """``compose()`` gives planned, plain values, twice the same, from the installed files and not from the checkout."""
    answer = cell.probe("used", str(cell.conf), *LAUNCH, "+hardware=h200")

    first, second = answer["configs"]
    assert first == second
    assert "memfit" not in first
    assert first["actor_rollout_ref"]["actor"][BATCH.rpartition(".")[2]] < 32
    assert not Path(answer["where"]).is_relative_to(ROOT)


def test_a_run_plans_and_leaves_its_record(cell: Cell, tmp_path: Path) -> None:
    """Under ``@hydra.main`` the job gets the plan, its directory the record, and the config that is saved is plain."""
    ran = cell.run(cell.app, *LAUNCH, "+hardware=h200", f"hydra.run.dir={tmp_path}")

    assert ran.code == 0, ran.err
    (job,) = ran.jobs
    record = json.loads((tmp_path / ".hydra" / "memfit.json").read_text())
    assert job["MEMFIT_PLAN"] == str(tmp_path / ".hydra" / "memfit.json")
    assert record["hardware"]["name"] == "h200"
    assert record["fits"] is True
    changed = {change["key"]: change["to"] for change in record["changes"]}
    assert job["config"]["actor_rollout_ref"]["actor"][BATCH.rpartition(".")[2]] == changed[BATCH]
    assert "memfit" not in (tmp_path / ".hydra" / "config.yaml").read_text()
    assert "update_actor" in ran.err


def test_the_page_and_its_formulas_are_installed(cell: Cell, tmp_path: Path) -> None:
    """What the page is made of comes with the package, the documentation's formulas, too."""
    script = tmp_path / "files.py"
    script.write_text(
        "from hydra_plugins.memfit.base.paths import docs_dir\n"
        "from hydra_plugins.memfit.report import formulas, html\n"
        "names = [formulas.formulas(c).html[:3] for c in (formulas.MODEL, formulas.GENERATION, formulas.TPU)]\n"
        "print(docs_dir(), *names, *sorted(path.name for path in html.FILES.iterdir()), sep='|')\n",
        encoding="utf-8",
    )
    ran = cell.run(script)

    assert ran.code == 0, ran.err
    where, *found = ran.out.strip().split("|")
    assert not Path(where).is_relative_to(ROOT)
    assert found == ["<h2", "<h3", "<h3", "page.css", "page.html", "page.js"]


def test_cfg_job_shows_the_plan(cell: Cell) -> None:
    """``--cfg job`` prints the planned config on stdout and the report on stderr."""
    ran = cell.run(cell.app, *LAUNCH, "+hardware=h200", "--cfg", "job")

    assert ran.code == 0, ran.err
    assert "memfit" not in ran.out
    assert "ppo_micro_batch_size_per_gpu: 32" not in ran.out
    assert "update_actor" in ran.err


def test_a_sweep_plans_each_job(cell: Cell, tmp_path: Path) -> None:
    """``-m +hardware=h200,b200``: each job is planned for its own hardware and leaves its own record."""
    ran = cell.run(cell.app, "-m", *LAUNCH, "+hardware=h200,b200", f"hydra.sweep.dir={tmp_path}")

    assert ran.code == 0, ran.err
    assert len(ran.jobs) == 2
    names = [json.loads((tmp_path / job / ".hydra" / "memfit.json").read_text())["hardware"]["name"] for job in "01"]
    assert names == ["h200", "b200"]


def test_a_refusal_is_readable(cell: Cell, tmp_path: Path) -> None:
    """A launch that its pins make impossible stops with the reason, without a traceback, and starts no job."""
    ran = cell.run(cell.app, "+hardware=l4", *LAUNCH, f"hydra.run.dir={tmp_path}")

    assert ran.code == 1
    assert ran.jobs == []
    assert "no plan fits" in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.splitlines()) < 80

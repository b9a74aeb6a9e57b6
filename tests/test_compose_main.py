"""The hook under ``@hydra.main``, in processes of their own: what the job gets, what the user sees, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from support.hydra_app import BATCH, LAUNCH, run, write_app

QUIET = "memfit.report=short"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the script of an application with verl's config."""
    return write_app(tmp_path_factory.mktemp("app"))


def test_the_job_gets_the_plan_and_hydra_its_record(app: Path, tmp_path: Path) -> None:
    """The saved config is plain and equals what ran; the record lies beside it; env_copy and env_set of the user live."""
    own = ["hydra.job.env_copy=[FOO]", "+hydra.job.env_set.BAR=1", f"hydra.run.dir={tmp_path}"]

    ran = run([app, *LAUNCH, "+hardware=h200", QUIET, *own], environ={"FOO": "kept"})

    assert ran.code == 0, ran.err
    (job,) = ran.jobs
    saved = OmegaConf.load(tmp_path / ".hydra" / "config.yaml")
    record = json.loads((tmp_path / ".hydra" / "memfit.json").read_text())
    assert job["FOO"] == "kept"
    assert job["MEMFIT_PLAN"] == str(tmp_path / ".hydra" / "memfit.json")
    assert OmegaConf.to_container(saved, resolve=True) == job["config"]
    assert {c["key"]: c["to"] for c in record["changes"]}[BATCH] == OmegaConf.select(saved, BATCH) < 32
    assert ran.err.count("memfit: ") == 1


def test_a_refusal_is_a_panel_and_one_line(app: Path, tmp_path: Path) -> None:
    """No traceback, no job, exit code 1; the reason stands once in the panel and once as Hydra's last line."""
    ran = run([app, "+hardware=l4", *LAUNCH, f"hydra.run.dir={tmp_path}"])

    assert (ran.code, ran.jobs) == (1, [])
    assert "Traceback" not in ran.err
    assert "full_key" not in ran.err
    assert ran.err.count("no plan fits") == 2
    assert not (tmp_path / ".hydra").exists()


@pytest.mark.slow
def test_a_sweep_over_the_hardware_plans_each_job(app: Path, tmp_path: Path) -> None:
    """Two accelerators, two plans, two reports, two records."""
    ran = run([app, "-m", *LAUNCH, "+hardware=h200,b200", f"hydra.sweep.dir={tmp_path}"])

    assert ran.code == 0, ran.err
    values = [OmegaConf.select(OmegaConf.create(job["config"]), BATCH) for job in ran.jobs]
    records = [json.loads((tmp_path / str(n) / ".hydra" / "memfit.json").read_text()) for n in range(2)]
    assert values[0] < values[1]
    assert [record["hardware"]["name"] for record in records] == ["h200", "b200"]
    assert ran.err.count("─ memfit: verl") == 2


@pytest.mark.slow
def test_a_sweep_over_a_value_is_planned_in_its_jobs_only(app: Path, tmp_path: Path) -> None:
    """The config that starts a sweep is not planned: it never runs."""
    sweep = ["+hardware=h200", f"{BATCH}=4,8", QUIET, f"hydra.sweep.dir={tmp_path}"]

    ran = run([app, "-m", *LAUNCH, *sweep])

    assert ran.code == 0, ran.err
    assert [OmegaConf.select(OmegaConf.create(job["config"]), BATCH) for job in ran.jobs] == [4, 8]
    assert ran.err.count("memfit: ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m"], ["hydra.mode=MULTIRUN"]])
def test_a_sweep_from_yaml_is_planned_in_its_jobs_only(tmp_path: Path, start: list[str]) -> None:
    """Parameters in hydra.sweeper.params: two jobs are planned, the config that starts them is not."""
    own = {"defaults": ["config", "_self_"], "hydra": {"sweeper": {"params": {BATCH: "4,8"}}}}
    app = write_app(tmp_path, swept=OmegaConf.to_yaml(OmegaConf.create(own)))
    asked = [word for word in LAUNCH if not word.startswith(BATCH)]
    words = ["--config-name", "swept", *start, *asked, "+hardware=h200", QUIET, f"hydra.sweep.dir={tmp_path}/out"]

    ran = run([app, *words])

    assert ran.code == 0, ran.err
    assert [OmegaConf.select(OmegaConf.create(job["config"]), BATCH) for job in ran.jobs] == [4, 8]
    assert ran.err.count("memfit: ") == 2


@pytest.mark.slow
def test_cfg_shows_the_planned_config(app: Path) -> None:
    """``--cfg job`` prints what a job would get, and a section of it, on stdout alone; nothing is written."""
    whole = run([app, *LAUNCH, "+hardware=h200", QUIET, "--cfg", "job", "--resolve"])
    section = run([app, *LAUNCH, "+hardware=h200", QUIET, "--cfg", "job", "-p", "actor_rollout_ref.actor"])

    assert (whole.code, section.code) == (0, 0), whole.err + section.err
    config = OmegaConf.create(whole.out)
    assert "memfit" not in config
    assert OmegaConf.create(section.out).ppo_micro_batch_size_per_gpu == OmegaConf.select(config, BATCH) < 32
    assert whole.err.startswith("memfit: verl")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--cfg", "hydra", "--resolve"], ["--info", "searchpath"], ["--help"]])
def test_other_ways_to_look(app: Path, tmp_path: Path, words: list[str]) -> None:
    """Hydra's other views work with the group, and write no record."""
    ran = run([app, *LAUNCH, "+hardware=h200", QUIET, f"hydra.run.dir={tmp_path}/run", *words])

    assert ran.code == 0, ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_children_of_a_launch_say_one_line(app: Path, tmp_path: Path) -> None:
    """A process that a launch starts plans the same, with the hardware that its parent read, and says so in one line."""
    seen = tmp_path / "environ.json"
    parent = (
        "import json, os, sys; from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(app.parent / 'conf')!r}, version_base='1.3'): compose('config', sys.argv[1:])\n"
        f"json.dump(dict(os.environ), open({str(seen)!r}, 'w'))\n"
    )
    script = tmp_path / "launcher.py"
    script.write_text(parent)

    first = run([script, *LAUNCH, "+hardware=auto"], environ={"MEMFIT_HARDWARE": "h200"})
    environ = json.loads(seen.read_text())
    child = run([app, *LAUNCH, "+hardware=auto", "hydra.run.dir=."], environ={**environ, "CUDA_VISIBLE_DEVICES": "3"})

    assert (first.code, child.code) == (0, 0), first.err + child.err
    assert len(first.err.splitlines()) > 10
    assert child.err.splitlines() == [line for line in child.err.splitlines() if line.startswith("memfit: verl")]
    assert len(child.err.splitlines()) == 1


def test_without_the_group_nothing_happens(app: Path) -> None:
    """The launch as it is typed today prints what it printed."""
    with_memfit = run([app, *LAUNCH, "--cfg", "job"])
    without = run([app, *LAUNCH, "--cfg", "job"], path=app.parent)

    assert with_memfit.out == without.out
    assert with_memfit.err == without.err == ""

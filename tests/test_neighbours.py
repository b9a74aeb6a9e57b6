"""Other people's Hydra applications and plugins, with memfit installed and not asked: byte for byte what they were."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.hydra_app import ROOT

pytestmark = pytest.mark.neighbours

RUNNER = ROOT / "tests" / "support" / "neighbour.py"
PROBE = ROOT / "tests" / "support" / "hydra_probe.py"
UNUSED = {"", ".base", ".base.paths", ".searchpath"}
"""All that Hydra's plugin scan may import of memfit, below ``hydra_plugins.memfit``."""
HEAD = """\
import hydra, logging
from omegaconf import DictConfig, OmegaConf

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    {body}

if __name__ == "__main__":
    main()
"""
PRINT = HEAD.format(body="print(OmegaConf.to_yaml(cfg, resolve=True))")
LOG = HEAD.format(body='logging.getLogger("app").warning("x is %s", cfg.x)')
SQUARE = HEAD.format(body="print(cfg.x); return float(cfg.x) ** 2 + float(cfg.y)")
STRUCTURED = """\
from dataclasses import dataclass, field
from typing import Any
import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

@dataclass
class Db:
    host: str = "localhost"
    port: int = MISSING

@dataclass
class Config:
    db: Db = field(default_factory=Db)
    debug: bool = False
    hardware: Any = None

ConfigStore.instance().store(name="config", node=Config)
ConfigStore.instance().store(group="hardware", name="mine", node={"cores": 2})

@hydra.main(config_name="config", version_base="1.3")
def main(cfg):
    print(OmegaConf.to_yaml(cfg))

main()
"""
COMPOSE = """\
from hydra import compose, initialize
from hydra.utils import instantiate
from omegaconf import OmegaConf

with initialize(config_path="conf", version_base="1.3"):
    for words in ([], ["a.b=7"], ["+experiment=big"], ["db=postgresql", "hydra.verbose=true"]):
        print(OmegaConf.to_yaml(compose("config", words, return_hydra_config=False)))
print(instantiate({"_target_": "fractions.Fraction", "numerator": 3, "denominator": 4}))
"""
ZEN = """\
from hydra_zen import builds, make_config, store, to_yaml, zen

def make(x: int, y: int = 2) -> int:
    return x + y

Config = make_config(made=builds(make, x=1, populate_full_signature=True), scale=3)
store(Config, name="config")

def task(made: int, scale: int) -> None:
    print(made * scale)

if __name__ == "__main__":
    print(to_yaml(Config))
    store.add_to_hydra_store()
    zen(task).hydra_main(config_name="config", version_base="1.3", config_path=None)
"""
DB = {
    "config": "defaults: [db: mysql, _self_]\na: {b: 1, c: '${.b}'}\nlist: [1, 2]\n",
    "db/mysql": "driver: mysql\nport: 3306\n",
    "db/postgresql": "driver: postgresql\nuser: ${oc.env:NOBODY,me}\n",
    "experiment/big": "# @package _global_\ndefaults: [override /db: postgresql]\na: {b: 100}\n",
}
OWN = {
    "config": "defaults: [hardware: auto, model: qwen2.5-7b, _self_]\nmemfit: {own: 1}\nactor_rollout_ref: {actor: 1}\n",
    "hardware/auto": "gpus: mine\n",
    "model/qwen2.5-7b": "layers: 3\n",
}
SWEPT = {"config": "x: 1\ny: 2\n"}


@dataclass(frozen=True, kw_only=True, slots=True)
class App:
    """A Hydra application: its script, the command lines to try, and its yaml files by name."""

    script: str
    lines: tuple[str, ...] = ("",)
    files: Mapping[str, str] = field(default_factory=dict)


APPS = {
    "groups": App(
        script=PRINT, files=DB,
        lines=("", "db=postgresql a.b=3", "+a.d=4 ~list", "+experiment=big", "--cfg job --resolve", "-m a.b=1,2"),
    ),
    "groups called hardware and model, a section called memfit": App(script=PRINT, files=OWN, lines=("", "memfit.own=2")),
    "structured configs": App(script=STRUCTURED, lines=("db.port=1", "db.port=1 +hardware=mine", "db.port=x")),
    "compose and instantiate": App(script=COMPOSE, files=DB),
    "hydra-zen": App(script=ZEN, lines=("", "made.x=5 scale=2")),
    "hydra-colorlog": App(script=LOG, files=SWEPT, lines=("hydra/job_logging=colorlog hydra/hydra_logging=colorlog",)),
    "hydra-joblib-launcher": App(
        script=SQUARE, files=SWEPT, lines=("-m x=1,2,3 hydra/launcher=joblib hydra.launcher.n_jobs=1",),
    ),
    "hydra-submitit-launcher": App(
        script=SQUARE, files=SWEPT, lines=("-m x=1,2 hydra/launcher=submitit_local hydra.launcher.timeout_min=2",),
    ),
    "hydra-optuna-sweeper": App(
        script=SQUARE, files=SWEPT,
        lines=("-m hydra/sweeper=optuna hydra.sweeper.n_trials=5 hydra.sweeper.sampler.seed=1 x=interval(-5,5) y=1,2",),
    ),
}  # fmt: skip


def write(folder: Path, app: App) -> Path:
    """Write the application to ``folder``; return its script."""
    for name, text in {"../app": "", **app.files}.items():
        target = folder / "conf" / f"{name}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (folder / "app.yaml").unlink()
    (folder / "app.py").write_text(app.script)
    return folder / "app.py"


def run(how: str, script: Path, line: str, folder: Path, environ: Mapping[str, str] | None = None) -> dict[str, object]:
    """Return what a run printed, what it wrote and what it imported; ``how``: memfit in reach, or not."""
    folder.mkdir()
    is_app = "hydra.main" in script.read_text() or "hydra_main" in script.read_text()
    where = (
        [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}/sweep"]
        if is_app and line[:1] + line[1:2] != "-"
        else []
    )
    report = folder / "report.json"
    words = [*shlex.split(line), *where]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MEMFIT_", "HYDRA_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RUNNER), how, str(report), str(script), *words],
        env={**variables, "PYTHONPATH": str(ROOT), **(environ or {})},
        cwd=folder, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    imported = json.loads(report.read_text())
    return {
        "code": done.returncode,
        "out": _plain(done.stdout, folder),
        "err": _plain(done.stderr, folder),
        "files": {str(path.relative_to(folder)): _content(path, folder) for path in sorted(folder.rglob("*.yaml"))},
        "heavy": imported["heavy"],
        "rooms": {name.removeprefix("hydra_plugins.memfit") for name in imported["rooms"]},
    }


def _plain(text: str, folder: Path) -> str:
    """Return the text without what differs between any two runs: folders, dates, seconds, names drawn at random."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"\d{4}-\d\d-\d\d[ _/T]\d\d[:-]\d\d[:-]\d\d([,.]\d+)?|\d+\.\d+ ?s(ec)?\b", "TIME", text)
    return re.sub(r"\b\d{4,}(_\d+)*\b", "NUMBER", text)


def _content(path: Path, folder: Path) -> str:
    """Return a file that Hydra saved; its own record lists memfit among the places to search, and nothing else of it."""
    text = path.read_text()
    if path.name in ("hydra.yaml", "multirun.yaml"):
        text = re.sub(r"    - path: [^\n]*\n      schema: memfit\n      provider: memfit\n", "", text)
    return _plain(text, folder)


@pytest.mark.parametrize("name", list(APPS))
def test_a_neighbour_is_what_it_was(name: str, tmp_path: Path) -> None:
    """The same output, the same saved configs, the same exit status, and not one heavy module more."""
    script = write(tmp_path, APPS[name])
    for number, line in enumerate(APPS[name].lines):
        apart = run("without", script, line, tmp_path / f"without{number}")
        beside = run("with", script, line, tmp_path / f"within{number}")

        assert apart["rooms"] == set()
        assert beside["rooms"] == UNUSED
        apart["rooms"] = beside["rooms"] = ""
        assert _same_names(beside) == _same_names(apart)
        assert apart["code"] == (1 if "port=x" in line else 0), apart["err"]


def _same_names(answer: dict[str, object]) -> str:
    return json.dumps(answer, indent=1, default=sorted).replace("within", "without")


def test_help_lists_the_groups(tmp_path: Path) -> None:
    """What does change: ``--help`` of any application lists the groups that it could now choose from."""
    script = write(tmp_path, APPS["groups"])
    apart, beside = (str(run(how, script, "--help", tmp_path / how)["out"]) for how in ("without", "with"))

    more = [line for line in beside.splitlines() if line not in apart.splitlines()]
    assert [line.split(":")[0] for line in more] == ["hardware", "memfit", "model"]
    assert [line for line in apart.splitlines() if line not in beside.splitlines()] == []


def garbage(folder: Path) -> dict[str, str]:
    """Return an environment whose driver library is no library."""
    library = folder / "lib"
    library.mkdir()
    (library / "libnvidia-ml.so.1").write_bytes(b"garbage")
    return {"LD_LIBRARY_PATH": str(library)}


SURROUNDINGS = {
    "a broken driver": garbage,
    "a home that does not exist": lambda folder: {"HOME": "/nowhere", "XDG_CACHE_HOME": "/dev/null"},
    "no home": lambda folder: {"HOME": "", "XDG_CACHE_HOME": ""},
    "variables of memfit that are garbage": lambda folder: {
        "MEMFIT_HARDWARE": "nonsense", "MEMFIT_DETECTED": "{", "MEMFIT_REPORTED": "\x01", "MEMFIT_DEBUG": "1",
    },
    "no terminal, no language": lambda folder: {"TERM": "", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
}  # fmt: skip


@pytest.mark.parametrize("name", list(SURROUNDINGS))
def test_broken_surroundings_do_not_matter(name: str, tmp_path: Path) -> None:
    """What memfit would read if it were asked is not even looked at."""
    script = write(tmp_path, APPS["groups"])
    environ = SURROUNDINGS[name](tmp_path)
    apart, beside = (run(how, script, "", tmp_path / how, environ) for how in ("without", "with"))

    assert beside["code"] == 0, beside["err"]
    assert (beside["out"], beside["files"], beside["heavy"]) == (apart["out"], apart["files"], apart["heavy"])


def test_without_a_network_and_without_a_writable_folder(tmp_path: Path) -> None:
    """In a network namespace of its own and in a folder that nobody can write to, the application starts."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True).returncode:
        pytest.skip("this user may not leave the network")
    script = write(tmp_path, APPS["groups"])
    command = [unshare, "-n", sys.executable, str(RUNNER), "with", str(tmp_path / "report.json"), str(script)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--cfg", "job"], env=environ, cwd="/proc/self", capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "driver: mysql" in done.stdout


def test_the_scan_stays_within_two_milliseconds(tmp_path: Path) -> None:
    """Processor time of Hydra's plugin scan for memfit, among all these plugins: the least of five processes."""
    write(tmp_path, APPS["groups"])
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(PROBE), "unused", str(tmp_path / "conf")]
    answers = [
        json.loads(subprocess.run(command, env=environ, capture_output=True, timeout=60).stdout) for _ in range(5)
    ]

    print(f"scan: {sorted(round(answer['scan_ms'], 2) for answer in answers)} ms")
    assert answers[0]["plugins"].count("MemfitSearchPathPlugin") == 1
    assert min(answer["scan_ms"] for answer in answers) <= 2.0


def test_a_launch_still_plans_among_them(tmp_path: Path) -> None:
    """The comparison is of two different things: in the same environment a launch that asks is planned."""
    script = write(tmp_path, App(script=PRINT, files={"config": "x: 1\n"}))
    answer = run("with", script, "+hardware=h200", tmp_path / "asked")

    assert answer["code"] == 1
    assert "of no framework that memfit knows" in str(answer["err"])

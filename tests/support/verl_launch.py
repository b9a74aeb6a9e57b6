"""Composes verl launches in processes of their own, with and without memfit in reach.

As a program (``python verl_launch.py < jobs.json``) it composes a list of jobs with Hydra's ``compose``; it imports
nothing of memfit, so the same program also composes where memfit does not exist.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEEDS = Path(__file__).resolve().parents[1] / "data" / "seeds"
NOT_FORWARDED = ("MEMFIT_HARDWARE", "PYTORCH_CUDA_ALLOC_CONF", "HYDRA_FULL_ERROR")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One launch: the words that a user types after ``python -m verl.trainer.main_ppo``."""

    config_dir: str
    words: list[str]
    config_name: str = "ppo_trainer"
    environ: dict[str, str] = field(default_factory=dict)
    validate: bool = False
    """Let the installed verl check what was composed; its objection is the job's `Composed.error`."""
    count: bool = False
    """Count the calls of functions, which slows the composition: `Composed.seconds` is of no use then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """What a job composed to. ``pickled`` is cloudpickle's bytes, as Ray ships them; `error` is empty on success."""

    yaml: str
    resolved: dict[str, Any]
    pickled: str
    seconds: float
    """Processor time, which does not count what else the machine does."""
    error: str
    calls: int = 0
    """Calls of Python's and C's functions while it was composed, the same in each run; 0 where none were counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """One launch that is known to have died, from tests/data/seeds."""

    id: str
    hardware: str
    requested: dict[str, Any]
    assumed: dict[str, Any]
    readings: dict[str, dict[str, Any]]
    observed: dict[str, Any]
    explained_by: dict[str, list[str]]
    unchanged: list[str]
    reported_fix: dict[str, Any]
    reported_peak_gb: list[int] | None = None

    def values(self, reading: str) -> dict[str, Any]:
        """Return the whole launch under one reading of what was not reported."""
        return self.assumed | self.requested | self.readings[reading]


def seed(name: str) -> Seed:
    """Return the seed of that name."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(SEEDS / f"{name}.yaml"))
    return Seed(**content)


def words(values: Mapping[str, Any]) -> list[str]:
    """Return the command-line words that set ``values``."""
    return [f"{key}={_literal(value)}" for key, value in values.items()]


def _literal(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def environment(extra: Mapping[str, str] = {}, *, memfit: bool = True) -> dict[str, str]:
    """Return the environment of a child process: the caller's own, with memfit's checkout in reach or out of it."""
    kept = {key: value for key, value in os.environ.items() if key not in NOT_FORWARDED}
    paths = [path for path in kept.pop("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
    return (
        kept | {"PYTHONPATH": os.pathsep.join([str(ROOT)] * memfit + paths), "PYTHONWARNINGS": "ignore"} | dict(extra)
    )


def compose_jobs(jobs: Sequence[Job], *, memfit: bool = True, timeout: float = 300) -> list[Composed]:
    """Compose all jobs, in order, in one new process.

    Without memfit the process skips ``site`` (so that an editable install is not put on the path) and is given the
    plain site-packages, where memfit must not be: see `assert_memfit_is_absent`.
    """
    text = json.dumps([asdict(job) for job in jobs])
    return [Composed(**entry) for entry in json.loads(_run_self([], text, memfit=memfit, timeout=timeout))]


def resolve_elsewhere(pickled: Sequence[str], *, timeout: float = 120) -> list[dict[str, Any]]:
    """Unpickle and resolve configs in a new process without memfit, as Ray's worker does, and return plain data."""
    resolved: list[dict[str, Any]] = json.loads(
        _run_self(["--resolve"], json.dumps(list(pickled)), memfit=False, timeout=timeout)
    )
    return resolved


def _run_self(arguments: list[str], text: str, *, memfit: bool, timeout: float) -> str:
    program = [sys.executable, *([] if memfit else ["-S"]), __file__, *arguments]
    site_packages = {} if memfit else {"VERL_LAUNCH_SITE": sysconfig.get_paths()["purelib"]}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            program, input=text, capture_output=True, text=True, timeout=timeout, check=False,
            cwd=directory, env=environment(site_packages, memfit=memfit),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def assert_memfit_is_absent() -> None:
    """Raise if this process could import memfit: the comparison would compare memfit with itself."""
    from importlib.util import find_spec

    # an editable install leaves data files of memfit in site-packages: a namespace without code
    if all(find_spec(name) for name in ("hydra_plugins", "hydra_plugins.memfit", "hydra_plugins.memfit.searchpath")):
        raise SystemExit("memfit is installed as a wheel in this environment; these tests need a checkout of it")


class _Calls:
    """Counts the calls of functions in its block, where it is asked to."""

    def __init__(self, is_asked: bool) -> None:
        self._is_asked = is_asked
        self.number = 0

    def __enter__(self) -> _Calls:
        if self._is_asked:
            sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: object, event: str, argument: object) -> None:
        self.number += event in ("call", "c_call")


def _compose(job: Mapping[str, Any]) -> dict[str, Any]:
    import cloudpickle
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    before = dict(os.environ)
    os.environ.update(job["environ"])
    gc.collect()  # none pays for the garbage of another
    start = time.process_time()
    try:
        with _Calls(job["count"]) as calls, initialize_config_dir(job["config_dir"], version_base=None):
            config = compose(job["config_name"], overrides=job["words"])
        seconds = time.process_time() - start
        if job["validate"]:
            _validate(config)
        return {
            "yaml": OmegaConf.to_yaml(config),
            "resolved": OmegaConf.to_container(config, resolve=True),
            "pickled": base64.b64encode(cloudpickle.dumps(config)).decode(),
            "seconds": seconds,
            "error": "",
            "calls": calls.number,
        }
    except Exception as error:
        return {"yaml": "", "resolved": {}, "pickled": "", "seconds": 0.0, "error": _whole_text(error)}
    finally:
        os.environ.clear()
        os.environ.update(before)


def _validate(config: Any) -> None:
    from copy import deepcopy

    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    own = deepcopy(config)
    validate_config(config=own, use_reference_policy=need_reference_policy(own), use_critic=need_critic(own))


def _whole_text(error: BaseException | None) -> str:
    """Return the message of an error and of what caused it: Hydra wraps a resolver's error twice."""
    return f"{type(error).__name__}: {error}\n{_whole_text(error.__cause__)}" if error else ""


def _resolve(pickled: str) -> Any:
    import cloudpickle
    from omegaconf import OmegaConf

    config = cloudpickle.loads(base64.b64decode(pickled))
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config, throw_on_missing=False)


def main() -> None:
    """Answer one request on stdin; whatever is printed meanwhile goes to stderr."""
    answer, sys.stdout = sys.stdout, sys.stderr
    if "VERL_LAUNCH_SITE" in os.environ:
        sys.path.append(os.environ["VERL_LAUNCH_SITE"])
        assert_memfit_is_absent()
    request = json.load(sys.stdin)
    json.dump([_resolve(p) for p in request] if "--resolve" in sys.argv else [_compose(j) for j in request], answer)


if __name__ == "__main__":
    main()

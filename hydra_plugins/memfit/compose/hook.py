"""What happens between Hydra's composition and the launch: read, plan, write back, report. Once for each config.

Hydra reads ``hydra.runtime.choices`` right after it has applied the command line: under ``@hydra.main``, in
``compose()``, for ``--cfg job`` and for each job of a sweep. The hardware groups put the resolver of `fit` there. No
user sets that key, so nothing of theirs is lost and nothing merges over it. If Hydra ever stops to read it, the
``memfit`` node stays in the config: its ``unplanned`` raises when it is resolved, and `write_record` stops the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationResolutionError

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError
from hydra_plugins.memfit.compose import pages, record
from hydra_plugins.memfit.compose.handover import VARIABLE
from hydra_plugins.memfit.compose.launch import Launch
from hydra_plugins.memfit.compose.learned import VARIABLE as LEARNED
from hydra_plugins.memfit.compose.overrides import Order, read_order
from hydra_plugins.memfit.compose.plain import Composed, plain
from hydra_plugins.memfit.compose.settings import is_strict
from hydra_plugins.memfit.compose.write import NOT_OURS, write_plan
from hydra_plugins.memfit.planning.problem import Plan

REPORTED = "MEMFIT_REPORTED"
"""Environment variable: digests of the plans reported so far; a child process of the launch says one line only."""

_COMPLETION = frozenset({"-sc", "--shell_completion", "--shell-completion"})
_MULTIRUN = frozenset({"-m", "--multirun"})
_MAX_LINE = 300
_MAX_ANSWERS = 4
_answers: dict[str, Plan | MemfitError] = {}
"""What this process answered, by question: Hydra before 1.4 composes each ``@hydra.main`` launch twice."""
_said: set[str] = set()
"""What this process printed."""


class LaunchStopped(InterpolationResolutionError, CompactHydraException):
    """A refusal in one line: OmegaConf passes on the first base unwrapped, Hydra prints no traceback for the second."""

    _initialized = True  # tells OmegaConf not to append where in the config it was raised

    @classmethod
    def because(cls, error: MemfitError) -> LaunchStopped:
        """Return the refusal for an ``error`` that has been printed in full."""
        return cls("memfit: " + shorten(str(error), _MAX_LINE, placeholder=" ... (in full above)"))


def fit(config: DictConfig) -> DictConfig:
    """Plan the launch that ``config`` composes and write the plan into it; return the node that Hydra asked for.

    Raises `LaunchStopped`, after the reason has been printed, when the launch cannot fit or cannot be judged and
    ``memfit.strict`` is true; otherwise the reason is a warning and the config stays as it was composed.
    """
    if "overrides" not in config.hydra:  # OmegaConf looks into our own file while Hydra merges it: no launch yet
        return DictConfig({})
    with read_write(config), open_dict(config):
        config.hydra.runtime.choices = {}
    if not isinstance(config.get("memfit"), DictConfig):
        gone = ConfigError("the hardware group brought the section memfit, and something took it away or replaced it.")
        raise LaunchStopped.because(gone)
    node = plain(config.memfit, leave_out=frozenset({"unplanned"}))
    composed = Composed.of(config, leave_out=NOT_OURS)
    try:
        order = read_order(_words(config), composed)
        launch = Launch(config=composed, node=node, order=order)
        plan = None if _starts_no_job(config, order) else _answer(launch)
    except MemfitError as error:
        _refuse(config, error, node)
    else:
        if plan is not None:
            _apply(config, launch, plan)
    return config.hydra.runtime.choices  # type: ignore[no-any-return]


def _starts_no_job(config: DictConfig, order: Order) -> bool:
    """Whether this composition only serves to start others: the jobs of a sweep, or the completion of a word.

    A sweep is seen by its values on the command line, or by parameters in ``hydra.sweeper.params`` that the command line
    lacks: the sweeper puts them there for each job.
    """
    arguments = set(sys.argv[1:])
    if order.sweeps or arguments & _COMPLETION:
        return True
    parameters = OmegaConf.select(config, "hydra.sweeper.params") or {}
    swept = {str(key).lstrip("+~").partition("@")[0] for key in parameters}
    is_multirun = bool(arguments & _MULTIRUN) or "MULTIRUN" in str(config.hydra.mode)
    return is_multirun and not swept <= order.named


def _words(config: DictConfig) -> list[str]:
    """Return the command line as it was typed: a word may hold an interpolation, which is not ours to resolve."""
    words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return [str(word) for word in words] if isinstance(words, list) else []


def forget() -> None:
    """Forget what this process planned and printed, as in a new process."""
    _answers.clear()
    _said.clear()


def refuse_unplanned() -> None:
    """Raise: somebody resolves a config in which a hardware group was composed and that was never planned."""
    raise MemfitError(
        "this config names a hardware group, and Hydra did not ask memfit for the plan. Leave the hardware group out, "
        "or use a version of hydra-core that memfit is tested with: 1.3.2 to 1.4.0rc3."
    )


def _apply(config: DictConfig, launch: Launch, plan: Plan) -> None:
    try:
        write_plan(config, plan, launch.order.pinned, launch.config)
    except MemfitError as error:  # half a plan is none: this stops the launch also where memfit.strict is false
        _print(error, launch.node)
        raise LaunchStopped.because(error) from error
    from hydra_plugins.memfit.learning.kind import expectation
    from hydra_plugins.memfit.report.json import to_dict

    document = to_dict(plan)
    _finish(config, {**document, "learning": expectation(plan)})
    _report(config, plan, _digest(document))


def _answer(launch: Launch) -> Plan:
    """Return the plan, from memory when this process planned the same launch before; raises `MemfitError` alike."""
    surroundings = {key: value for key, value in os.environ.items() if key not in (VARIABLE, REPORTED, LEARNED)}
    order = [sorted(launch.order.explicit), sorted(launch.order.pinned)]
    question = _digest([launch.config, launch.node, order, surroundings, os.getcwd()])
    if question not in _answers:
        if len(_answers) >= _MAX_ANSWERS:
            _answers.clear()
        _answers[question] = _plan(launch)
    answer = _answers[question]
    if isinstance(answer, MemfitError):
        raise answer
    return answer


def _plan(launch: Launch) -> Plan | MemfitError:
    try:
        return launch.plan()
    except MemfitError as error:
        return error
    except Exception as error:  # a defect of memfit must be no riddle for the user
        defect = MemfitError(
            f"memfit itself failed ({type(error).__name__}: {error}). Please report it; without the hardware group, or "
            "with memfit.strict=false, the launch starts as it was composed."
        )
        defect.__cause__ = error
        return defect


def _refuse(config: DictConfig, error: MemfitError, node: Mapping[str, Any]) -> None:
    """Print why there is no plan; then stop the launch, or let it start as it was composed."""
    is_new = _print(error, node)
    if is_strict(node):
        raise LaunchStopped.because(error) from error
    if is_new:
        print("memfit: strict is false: the launch starts as it was composed, without a plan.", file=sys.stderr)
    _finish(config, {"planned": False, "reason": str(error)})


def _print(error: MemfitError, node: Mapping[str, Any]) -> bool:
    """Print ``error`` as ``memfit.report`` asks, unless this process printed it before; return whether it did."""
    from hydra_plugins.memfit.report.text import print_error

    if str(error) in _said:
        return False
    _said.add(str(error))
    style = node.get("report")
    print_error(error, style if isinstance(style, str) else "full")
    plan = getattr(error, "plan", None)
    if style == "html" and isinstance(plan, Plan):
        pages.make_page(plan, _digest(str(error)), os.environ, refusal=str(error))
    return True


def _finish(config: DictConfig, document: dict[str, Any]) -> None:
    """Take memfit out of the config of the job, and leave its record with Hydra's own."""
    record.keep_record(config, document)
    with read_write(config), open_dict(config):
        del config["memfit"]


def _report(config: DictConfig, plan: Plan, digest: str) -> None:
    """Report once for each launch: as it is asked by its first process, in one line by the processes it starts."""
    if _is_another_rank(os.environ):
        return
    style = plan.problem.settings.report
    if digest not in _said:
        _said.add(digest)
        reported = os.environ.get(REPORTED, "").split()
        _print_plan(plan, "short" if style != "off" and digest in reported else style, digest)
        os.environ[REPORTED] = " ".join([*reported, digest][-64:])
    if style == "html":
        pages.keep_page(config, digest, os.environ)


def _is_another_rank(environ: Mapping[str, str]) -> bool:
    """Whether torchrun started this process beside the one with rank 0, which reports for all."""
    return "TORCHELASTIC_RUN_ID" in environ and environ.get("RANK", "0") != "0"


def _print_plan(plan: Plan, style: str, digest: str) -> None:
    from hydra_plugins.memfit.report.text import print_plan

    print_plan(plan, style)
    if style == "html" and not pages.make_page(plan, digest, os.environ):
        print_plan(plan, "full")


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

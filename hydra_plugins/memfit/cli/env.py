"""``memfit env``: the plan of a runner that takes its settings from environment variables, as lines for ``eval``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NoPlanFits
from hydra_plugins.memfit.cli.options import add_launch_options

if TYPE_CHECKING:
    from hydra_plugins.memfit.planning.problem import Plan

FAILED = "false"
"""Printed where there is no plan: ``eval "$(memfit env ...)"`` then has its exit status, and ``set -e`` or ``&&`` stop."""
GROUPS = ("hardware", "model")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = (
        "Plan a runner that takes its settings from environment variables (MLLM-JAX), and print them as export lines."
    )
    parser = subparsers.add_parser(
        "env", help="print the plan as export lines for eval", description=says, allow_abbrev=False
    )
    add_launch_options(
        parser, 'eval "$(memfit env --hardware v4-16 MODEL_PATH=Qwen/Qwen2.5-7B-Instruct BATCH_SIZE=1 NUM_PRE_Q=8)"'
    )


def run(args: argparse.Namespace) -> int:
    """Print one ``export`` line a variable on stdout, the report on stderr; return 0, or 3 when no plan fits.

    With ``--json``: the plan as ``memfit plan --json`` prints it, and the variables below ``env``.
    """
    from hydra_plugins.memfit.report.text import print_plan

    if args.json:
        return _as_json(args)
    try:
        variables, plan = _planned(args)
        print_plan(plan, plan.problem.settings.report, stream=sys.stderr)
        lines = exports(variables)
    except MemfitError:
        print(FAILED)
        raise
    print(*lines, sep="\n")
    return 0


def _as_json(args: argparse.Namespace) -> int:
    from hydra_plugins.memfit.cli.output import print_json, show_refusal
    from hydra_plugins.memfit.report.json import to_dict

    try:
        variables, plan = _planned(args)
    except NoPlanFits as error:
        show_refusal(error, as_json=True)
        return 3
    exports(variables)  # refuses what is no variable
    print_json({**to_dict(plan), "env": {name: _text(value) for name, value in variables.items()}})
    return 0


def exports(variables: Mapping[str, object]) -> list[str]:
    """Return ``export NAME=value`` lines, safe to evaluate whatever a value holds.

    >>> exports({"BATCH_SIZE": 1, "MODEL_PATH": "a b; rm -r c"})
    ['export BATCH_SIZE=1', "export MODEL_PATH='a b; rm -r c'"]
    """
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"{name} is no environment variable: memfit env serves runners that read those. Use memfit plan here."
            )
    return [f"export {name}={shlex.quote(_text(value))}" for name, value in variables.items()]


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _planned(args: argparse.Namespace) -> tuple[dict[str, object], Plan]:
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.planning.search import make_plan

    given = _assignments(args.overrides)
    args.overrides = [_quoted(word) for word in args.overrides]
    args.framework = args.framework or "mllm-jax"
    _choose_version(args, given)
    launch = read_launch(args)
    plan = make_plan(launch.problem, pinned=launch.pinned)
    return given | {change.key: change.new for change in plan.changes}, plan


def _assignments(words: Sequence[str]) -> dict[str, object]:
    """Return the variables among ``words``, their values as they were typed."""
    pairs = (word.partition("=") for word in words)
    return {name: value for name, sign, value in pairs if sign and _VARIABLE.fullmatch(name) and name not in GROUPS}


def _quoted(word: str) -> str:
    """Quote a variable's text for Hydra's grammar, where ``MESH_SHAPE_FSDP=1,-1,1`` would be a sweep."""
    name, sign, value = word.partition("=")
    if not sign or not _VARIABLE.fullmatch(name) or name in GROUPS or _NUMBER.fullmatch(value):
        return word
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{text}"'


def _choose_version(args: argparse.Namespace, given: Mapping[str, object]) -> None:
    """Only the early commits of MLLM-JAX's runner read variables: which one, its variables say."""
    from hydra_plugins.memfit.frameworks.mllm_jax.keys import SPLIT, SWEEP

    if args.framework == "mllm-jax" and args.framework_version is None:
        args.framework_version = SPLIT if any(name.startswith("TRAIN_") for name in given) else SWEEP

"""``memfit plan``: which values make this launch fit?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hydra_plugins.memfit.cli.options import add_launch_options


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Plan a launch: change what does not fit, fill in what is unset, say why."
    add_launch_options(subparsers.add_parser("plan", help=says, description=says, allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Print the plan and its changes as overrides; return 0 when it fits, 3 when nothing does."""
    from hydra_plugins.memfit.base.errors import NoPlanFits
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.cli.output import show, show_refusal
    from hydra_plugins.memfit.planning.search import make_plan
    from hydra_plugins.memfit.report.overrides import overrides

    question = read_launch(args)
    try:
        plan = make_plan(question.problem, pinned=question.pinned)
    except NoPlanFits as error:
        show_refusal(error, as_json=args.json)
        return 3
    show(plan, as_json=args.json)
    if plan.changes and not args.json:
        print("As overrides:", *overrides(plan.changes, absent=question.absent), sep="\n  ", file=sys.stdout)
    return 0 if plan.fits else 3

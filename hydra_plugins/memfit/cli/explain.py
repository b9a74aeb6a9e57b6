"""``memfit explain``: the plan as one page for a browser."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hydra_plugins.memfit.cli.options import add_launch_options


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Plan a launch, and write one HTML page: memory by phase, what each knob would do, why."
    parser = subparsers.add_parser("explain", help=says, description=says, allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", default="memfit.html", help="the page (default: memfit.html)")


def run(args: argparse.Namespace) -> int:
    """Write the page and say the verdict in one line; return 0 when the launch fits, 3 when nothing does."""
    from pathlib import Path

    from hydra_plugins.memfit.base.errors import NoPlanFits
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.planning.problem import Plan
    from hydra_plugins.memfit.planning.search import make_plan
    from hydra_plugins.memfit.report.html import write_page
    from hydra_plugins.memfit.report.page_data import page_data
    from hydra_plugins.memfit.report.text import print_plan

    question = read_launch(args)
    try:
        plan, refusal = make_plan(question.problem, pinned=question.pinned), ""
    except NoPlanFits as error:
        assert isinstance(error.plan, Plan)
        plan, refusal = error.plan, str(error)
    if args.json:
        print_json(page_data(plan))
    else:
        write_page(plan, Path(args.output), refusal=refusal, absent=question.absent)
        print_plan(plan, "short", stream=sys.stdout)
        print(f"written to {args.output}")
    return 0 if plan.fits else 3

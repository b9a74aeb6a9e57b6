"""``memfit table``: one launch on several kinds and numbers of accelerators: what fits where, with which values."""

from __future__ import annotations

import argparse
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra_plugins.memfit.cli.options import add_launch_options

if TYPE_CHECKING:
    from hydra_plugins.memfit.report.table import Row

EXAMPLE = "memfit table --framework verl --model qwen2.5-7b --hardware a100-80,h200 --gpus 1,2,4,8 algorithm.adv_estimator=grpo"
FORMATS = ("terminal", "csv", "markdown")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Plan a launch for several accelerators: what fits where, and with which values."
    parser = subparsers.add_parser("table", help=says, description=says, allow_abbrev=False)
    add_launch_options(parser, EXAMPLE, several=True)
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="terminal (the default), csv or markdown")


def run(args: argparse.Namespace) -> int:
    """Print a row for each combination; return 0 when one fits, 3 when none does.

    Raises the `MemfitError` of the first combination when none of them can be judged, and `UnknownName` for a slip.
    """
    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.report import table

    cells = product(args.hardware or (None,), args.nodes or (None,), args.gpus or (None,))
    rows = [_row(args, *cell) for cell in cells]
    if all(row.error for row in rows):
        raise rows[0].error or AssertionError
    if args.json:
        print_json([table.as_dict(row) for row in rows])
    else:
        print(table.FORMATS[args.format](rows), end="")
    return 0 if any(row.fits for row in rows) else 3


def _row(args: argparse.Namespace, hardware: str | None, nodes: int | None, gpus: int | None) -> Row:
    from hydra_plugins.memfit.base.errors import MemfitError, NoPlanFits, UnknownName
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.planning.problem import Plan
    from hydra_plugins.memfit.planning.search import make_plan
    from hydra_plugins.memfit.report.table import Row

    one = argparse.Namespace(**{**vars(args), "hardware": hardware, "nodes": nodes, "gpus": gpus})
    try:
        question = read_launch(one)
        return Row.of(make_plan(question.problem, pinned=question.pinned), absent=question.absent)
    except NoPlanFits as error:
        assert isinstance(error.plan, Plan)
        return Row.of(error.plan)
    except UnknownName:
        raise
    except MemfitError as error:
        return Row(hardware=hardware or "auto", gpus=gpus or 0, nodes=nodes or 0, reason=str(error), error=error)

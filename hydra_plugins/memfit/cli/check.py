"""``memfit check``: does this launch fit as it is?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hydra_plugins.memfit.cli.options import add_launch_options


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Judge a launch as it is asked for; nothing is changed."
    parser = subparsers.add_parser("check", help=says, description=says, allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument(
        "--compile", action="store_true", help="TPU: settle it with the compiler itself (minutes; needs the extra tpu)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the prediction; return 0 when it fits, 3 when not, 2 when it would die for another reason than its size.

    A value that is missing, and that `plan` would fill in, is no such reason: the launch is judged by its size, and stderr says
    that it does not start.
    """
    from hydra_plugins.memfit.base.errors import ConfigError
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.cli.output import show
    from hydra_plugins.memfit.planning.search import check

    if args.compile:
        args.overrides = [*args.overrides, "memfit.exact=true"]
    problem = read_launch(args).problem
    if args.compile and problem.hardware.kind != "tpu":
        raise ConfigError(f"--compile asks the TPU compiler, and {problem.hardware.name} is a GPU. Leave it out.")
    plan = check(problem)
    show(plan, as_json=args.json)
    strict = plan.problem.settings.strict
    for reason in (*plan.problem.blockers, *plan.estimate.refusals) if strict else ():
        print(f"memfit: {reason}", file=sys.stderr)
    if plan.problem.blockers and strict:
        return 2
    return 0 if plan.fits else 3

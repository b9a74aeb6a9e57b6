"""``memfit diagnose``: what does this log say went wrong, and what would have fitted?"""

from __future__ import annotations

import argparse
from typing import Any

from hydra_plugins.memfit.cli.options import add_launch_options

FOUND, NOTHING_FOUND = 0, 3

_USAGE = "LOG [options] [key=value ...]"
_EPILOG = """\
LOG          a file, also gzipped, or - for stdin; of any size. Lines of several ranks, Ray's and torchrun's prefixes and
             colours are understood.
key=value    values of the launch, as for memfit plan. Left out, the launch is the one that the log shows (verl's config,
             Hydra's list of overrides, the command line of set -x), and the hardware the one whose capacity it names.

exit status: 0 a cause was found, 3 no known failure in the log, 2 the input is wrong
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Read the log of a launch that died: what ran out, in which phase, and what would have fitted."
    parser = subparsers.add_parser("diagnose", help=says, description=says, allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument("log", metavar="LOG", help="the log, or - for stdin")
    parser.usage, parser.epilog = f"{parser.prog} {_USAGE}", _EPILOG


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; return 0 when a cause was found, 3 when the log has none that is known."""
    from hydra_plugins.memfit.cli.diagnosed import diagnosis
    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.diagnosis.scan import scan
    from hydra_plugins.memfit.diagnosis.stream import open_log
    from hydra_plugins.memfit.report.diagnosis import lines, to_dict

    with open_log(args.log) as file:
        scanned = scan(file)
    found = diagnosis(args, scanned)
    if args.json:
        print_json(to_dict(found))
    else:
        print(*lines(found), sep="\n")
    return NOTHING_FOUND if found.cause is None else FOUND

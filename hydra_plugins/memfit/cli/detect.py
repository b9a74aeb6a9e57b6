"""``memfit detect``: which accelerators does this machine have?"""

from __future__ import annotations

import argparse
from typing import Any

EPILOG = """\
examples:
  memfit detect
  MEMFIT_HARDWARE=a100-80 memfit detect --json

exit status: 0 found, 2 this host has no accelerator (MEMFIT_HARDWARE=NAME answers for it)
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Show the accelerators of this machine, as +hardware=auto would read them."
    parser = subparsers.add_parser("detect", help=says, description=says, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print what is detected; raises `HardwareNotDetected` on a host without an accelerator."""
    import os

    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.hardware.resolve import describe, resolve
    from hydra_plugins.memfit.report.detected import lines

    found = resolve("auto", environ=os.environ)
    if args.json:
        print_json(describe(found))
    else:
        print(*lines(found), sep="\n")
    return 0

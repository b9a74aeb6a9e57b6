"""The console command ``memfit``. Each command is a module of this room, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.base.errors import MemfitError, NoPlanFits

COMMANDS = ("detect", "plan", "check", "env")
"""Each is a module ``cli/<name>.py`` with ``add_parser(subparsers)`` and ``run(args) -> exit status``."""

FITS, BROKEN, WRONG_INPUT, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: of this process) and return its exit status; no error is a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(arguments)
        return int(_command(args.command).run(args))
    except NoPlanFits as error:
        return _fail(error, DOES_NOT_FIT)
    except MemfitError as error:
        return _fail(error, WRONG_INPUT)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FITS
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _bug(error)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; ``args.overrides`` are the ``key=value`` words, between any options, in order."""
    parser = _parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    takes_overrides = getattr(args, "takes_overrides", False)
    args.overrides = _without_program(rest) if takes_overrides else rest
    unknown = [word for word in args.overrides if word.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; see memfit {args.command} --help.{_hint(unknown[0])}")
    return args


def _without_program(words: list[str]) -> list[str]:
    """Return the words of a pasted launch line without its ``python -m module``."""
    is_python = len(words) >= 3 and os.path.basename(words[0]).startswith("python") and words[1] == "-m"
    return words[3:] if is_python else words


def _hint(word: str) -> str:
    if not word.startswith(("--config-name", "--config-path", "--config-dir")):
        return ""
    return " A config of your own is composed by Hydra: COMMAND --cfg job > FILE, then --config FILE."


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memfit", description="Does a training launch fit its accelerators, and if not, what makes it fit?"
    )
    parser.add_argument("--version", action="version", version=f"memfit {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _command(name).add_parser(subparsers)
    return parser


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"hydra_plugins.memfit.cli.{name}")


def _fail(error: MemfitError, status: int) -> int:
    print(f"memfit: {error}", file=sys.stderr)
    return status


def _bug(error: Exception) -> int:
    if os.environ.get("MEMFIT_DEBUG"):
        raise error
    print(
        f"memfit: internal error, {type(error).__name__}: {error}\n"
        "This is a bug of memfit, not of your input. MEMFIT_DEBUG=1 shows where; please report it with the command.",
        file=sys.stderr,
    )
    return BROKEN


if __name__ == "__main__":
    raise SystemExit(main())

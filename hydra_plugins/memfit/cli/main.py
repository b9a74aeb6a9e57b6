"""The console command ``memfit``. Each command is a module of this room, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.base.errors import MemfitError, NoPlanFits

COMMANDS = ("detect", "plan", "check", "explain", "table", "diagnose", "learn", "env")
"""Each is a module ``cli/<name>.py`` with ``add_parser(subparsers)`` and ``run(args) -> exit status``."""

FITS, BROKEN, WRONG_INPUT, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: of this process) and return its exit status; no error is a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(arguments)
        with surroundings(args.pasted.environ if hasattr(args, "pasted") else {}):
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
    """Return the parsed command line; ``args.overrides`` are the ``key=value`` words, between any options, in order.

    ``args.pasted`` (`cli.pasted.Pasted`) is what a pasted launch line holds beside them.
    """
    from hydra_plugins.memfit.cli.pasted import hidden, shown

    parser = _parser(arguments)
    args, rest = parser.parse_known_args(hidden([word for word in arguments if word != "--"]))
    rest = shown(rest)
    takes_overrides = getattr(args, "takes_overrides", False)
    args.overrides = _values(args, rest) if takes_overrides else rest
    unknown = [word for word in args.overrides if word.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; see memfit {args.command} --help.")
    return args


def _values(args: argparse.Namespace, words: list[str]) -> list[str]:
    from hydra_plugins.memfit.cli.pasted import read_pasted

    args.pasted = read_pasted(words)
    variables = args.pasted.environ if args.command == "env" else {}
    return [*(f"{name}={value}" for name, value in variables.items()), *args.pasted.words]


@contextmanager
def surroundings(environ: Mapping[str, str]) -> Iterator[None]:
    """The environment in which a pasted line would have run."""
    before = dict(os.environ)
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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
    print(_wrapped(f"memfit: {error}"), file=sys.stderr)
    return status


def _wrapped(text: str) -> str:
    """Return ``text`` in the lines of a terminal, names whole; for a file or a pipe as it is."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False).fill
    return "\n".join(fill(line) for line in text.splitlines())


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

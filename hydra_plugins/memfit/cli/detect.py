"""``memfit detect``: which accelerators does this machine have?"""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Show the accelerators of this machine, as +hardware=auto would read them."
    parser = subparsers.add_parser("detect", help=says, description=says, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print what is detected; raises `HardwareNotDetected` on a host without an accelerator."""
    import os

    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.hardware.resolve import describe, resolve

    reading = describe(resolve("auto", environ=os.environ))
    if args.json:
        print_json(reading)
    else:
        print(_text(reading))
    return 0


def _text(reading: dict[str, Any]) -> str:
    return "\n".join(line for key, value in reading.items() for line in _lines(key, value))


def _lines(key: str, value: Any) -> list[str]:
    """Return ``key: value``, with bytes in GiB beside the exact number; nothing for what is not known."""
    if value is None or value in ([], ()):
        return []
    if isinstance(value, (list, tuple)):
        return [f"{key}:", *(f"  - {_entry(item)}" for item in value)]
    return [f"{key}: {_value(key, value)}"]


def _entry(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return ", ".join(f"{key} {_value(key, value)}" for key, value in item.items() if value is not None)


def _value(key: str, value: Any) -> str:
    from hydra_plugins.memfit.base.units import gib

    return f"{value} ({gib(value)})" if key.endswith("_bytes") and isinstance(value, int) else str(value)

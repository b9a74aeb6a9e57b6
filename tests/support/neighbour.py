"""Runs somebody's Hydra application with memfit in reach, or hidden: ``neighbour.py with|without REPORT SCRIPT WORD ...``.

REPORT gets, as JSON, which of the modules that memfit must not import were imported, and what of memfit was.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "pynvml", "rich", "torch", "transformers", "jax", "yaml.cyaml", "urllib.request", "subprocess")


def main() -> None:
    """Run the script as ``__main__``, in the state that Python would run it in."""
    how, report, script, *words = sys.argv[1:]
    own = Path(__file__).parent
    hidden = {own, ROOT} if how == "without" else {own}
    sys.path[:] = [
        str(Path(script).parent),
        *(path for path in sys.path if path and Path(path).resolve() not in hidden),
    ]
    sys.argv = [script, *words]
    parent = os.getpid()

    def write() -> None:
        if os.getpid() == parent:
            seen = [name for name in HEAVY if name in sys.modules]
            rooms = sorted(name for name in sys.modules if name.startswith("hydra_plugins.memfit"))
            Path(report).write_text(json.dumps({"heavy": seen, "rooms": rooms}))

    atexit.register(write)
    runpy.run_path(script, run_name="__main__")


main()

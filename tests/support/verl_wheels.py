"""verl's real packages for the tests: the installed one, and the wheels of the other versions."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from support.verl_defaults import unpack, wheel_of

CACHE_VARIABLE = "MEMFIT_VERL_WHEELS"
"""Directory of ``verl-<version>-*.whl`` files; without it they are downloaded once into the user's cache."""


def installed_package() -> Path:
    """Return the directory of the installed verl, without importing it."""
    spec = find_spec("verl")
    assert spec is not None and spec.origin is not None, "these tests need verl: pip install verl"
    return Path(spec.origin).parent


def wheel_directory() -> Path:
    """Return the directory where wheels are looked for."""
    asked = os.environ.get(CACHE_VARIABLE)
    return Path(asked) if asked else Path.home() / ".cache" / "memfit-tests" / "verl-wheels"


@cache
def package(version: str) -> Path:
    """Return the unpacked config part of one version's wheel; downloads the wheel when it is not there."""
    directory = wheel_directory()
    wheel = wheel_of(version, directory) or _download(version, directory)
    target = Path.home() / ".cache" / "memfit-tests" / f"verl-{version}"
    return unpack(wheel, target)


def _download(version: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), f"verl=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    wheel = wheel_of(version, directory)
    assert wheel is not None, f"no wheel of verl {version}; {CACHE_VARIABLE} may name a directory\n{done.stderr}"
    return wheel

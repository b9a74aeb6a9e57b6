"""Files that are written whole or not at all: several processes of a launch write the same one, and any may be killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whose folder is made; a reader sees the old file or the new one, under the user's umask.

    Raises `OSError`; nothing is left behind then. Only a process that is killed in between leaves a ``.part`` file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.urandom(6).hex()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Return memfit's folder in the user's cache; below ``/dev/null``, where nothing is kept, for one without a home."""
    home = environ.get("HOME") or os.path.expanduser("~")
    own = os.path.join(os.devnull if home == "~" else home, ".cache")
    return Path(environ.get("XDG_CACHE_HOME") or own) / "memfit"

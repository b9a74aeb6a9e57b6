"""A config.json as it lies on a disk or comes from a hub: a mapping, or one clear error."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path

from hydra_plugins.memfit.base.errors import ModelNotFound

MAX_BYTES = 10 * 1000 * 1000
"""A config.json has some kilobytes; anything larger is something else."""


def read_json(file: Path) -> Mapping[str, object]:
    """Return a config.json; raises `ModelNotFound` where it is unreadable, too large, not JSON, or no mapping."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelNotFound(f"{file} is not a file.")
        if status.st_size > MAX_BYTES:
            raise ModelNotFound(f"{file} has {status.st_size} bytes, which is no config.json (limit {MAX_BYTES}).")
        data = file.read_bytes()
    except OSError as error:
        raise ModelNotFound(f"{file} cannot be read: {error.strerror or error}.") from error
    return parse_json(data, file)


def parse_json(data: bytes, file: Path | str) -> Mapping[str, object]:
    """Return the mapping in ``data``; raises `ModelNotFound` otherwise."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelNotFound(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"{file} is JSON of type {type(config).__name__}, not the keys of a config.json.")
    return config

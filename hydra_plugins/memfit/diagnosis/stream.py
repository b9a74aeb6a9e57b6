"""A log as blocks of whole lines: a file, a gzip file or stdin, of any size, in bounded memory."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol, cast

from hydra_plugins.memfit.base.errors import ConfigError

BLOCK_BYTES = 1 << 18
"""How much is read at once; a line that is longer is cut into pieces."""
OVERLAP_BYTES = 2048
"""Bytes that a cut line's pieces share, so that a message at the cut is read whole."""
STDIN = "-"
_GZIP = b"\x1f\x8b"


class BinaryLog(Protocol):
    """What a log is read from. One `read1` returns what is there, so that a file that breaks off is read up to there."""

    def read1(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some whole lines of a log."""

    data: bytes
    first_line: int
    """Number of its first line, from 1."""


@contextmanager
def open_log(name: str) -> Iterator[BinaryLog]:
    """Open the log ``name`` for reading, unpacked; ``-`` is stdin. Raises `ConfigError` for what cannot be opened."""
    if name == STDIN:
        yield _unpacked(cast("BufferedReader", sys.stdin.buffer))
        return
    path = Path(name).expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"the log {name} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigError(f"the log {name!r} cannot be read: {error}.") from None
    with file:
        yield _unpacked(file)


def _unpacked(file: BufferedReader) -> BinaryLog:
    is_gzip = file.peek(2)[:2] == _GZIP
    return cast("BinaryLog", gzip.GzipFile(fileobj=file)) if is_gzip else file


def blocks(file: BinaryLog, notes: list[str]) -> Iterator[Block]:
    """Yield the log in blocks; a file that breaks off or is damaged ends there, and a sentence joins ``notes``."""
    rest, line = b"", 1
    for chunk in _chunks(file, notes):
        rest += chunk
        end = _last_end(rest)
        if not end and len(rest) < BLOCK_BYTES:
            continue
        data, rest = (rest[:end], rest[end:]) if end else (rest, rest[-OVERLAP_BYTES:])
        yield Block(data=data, first_line=line)
        line += data.count(b"\n")
    if rest:
        yield Block(data=rest, first_line=line)


def _chunks(file: BinaryLog, notes: list[str]) -> Iterator[bytes]:
    while True:
        try:
            chunk = file.read1(BLOCK_BYTES)
        except EOFError:
            notes.append("The gzip file breaks off in the middle; what could be unpacked was read.")
            return
        except (OSError, zlib.error) as error:
            notes.append(f"The log could not be read to its end ({error}); what came before was read.")
            return
        if not chunk:
            return
        yield chunk


def _last_end(data: bytes) -> int:
    """Return where the last whole line ends: at a line feed, else at the carriage return of a progress bar."""
    return data.rfind(b"\n") + 1 or data.rfind(b"\r") + 1

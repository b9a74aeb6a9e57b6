"""A word on stderr when something takes long, and nothing when it does not."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

AFTER_S = 1.0
"""Seconds that pass in silence."""


@contextlib.contextmanager
def slow(what: str, after_s: float = AFTER_S) -> Iterator[None]:
    """Say ``memfit: <what> ...`` on stderr, in one plain line, if the body takes longer than ``after_s`` seconds."""
    timer = threading.Timer(after_s, _say, args=(what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads stderr
        print(f"memfit: {what} ...", file=sys.stderr, flush=True)

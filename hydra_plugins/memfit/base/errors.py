"""One tree of errors. Each message says what was asked, what is valid, and the override that fixes it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile

_MOST_GUESSES = 3


class MemfitError(Exception):
    """Base of every error that memfit raises on purpose; its text is meant for the user."""


class ConfigError(MemfitError, ValueError):
    """The configuration, or a setting of memfit, is not valid."""


class UnknownName(ConfigError):
    """A name (hardware, model, framework, version) that memfit does not know."""

    def __init__(self, what: str, asked: str, known: Iterable[str], hint: str = "") -> None:
        self.what, self.asked, self.known = what, asked, tuple(sorted(known))
        rest = "" if _same_but_for_spelling(asked, self.known) else f" Known: {', '.join(self.known)}. {hint}".rstrip()
        super().__init__(f"unknown {what} {asked!r}.{guess(asked, self.known)}{rest}")


def guess(asked: str, known: Iterable[str]) -> str:
    """Return a question about the known names that ``asked`` may have meant, with a space in front; empty where none is near.

    >>> guess("fsdp3", ["fsdp", "fsdp2", "megatron"]), guess("RTX 3090", ["rtx3090", "rtx4090"]), guess("mine", ["grpo"])
    (" Did you mean 'fsdp2'?", " Did you mean 'rtx3090'?", '')
    """
    close = _closest(asked, sorted(known))
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _closest(asked: str, known: Iterable[str]) -> list[str]:
    """Return what ``asked`` may have meant: another spelling, the beginning of a few names, else the most alike one."""
    folded, names = asked.strip().casefold().replace(" ", "-"), list(known)
    begun = [name for name in names if len(folded) > 2 and name.casefold().startswith(folded)]
    exact = _same_but_for_spelling(asked, names)
    if exact or 0 < len(begun) <= _MOST_GUESSES:
        return exact or begun
    alike = difflib.get_close_matches(folded, names, n=5)
    return sorted(alike, key=lambda name: -_begins_alike(folded, name.casefold()))[:1]


def _same_but_for_spelling(asked: str, names: Iterable[str]) -> list[str]:
    """Return the names that differ in case, spaces and punctuation alone."""
    return [name for name in names if _squeezed(name) == _squeezed(asked)]


def _squeezed(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _begins_alike(one: str, other: str) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


class HardwareNotDetected(MemfitError):
    """``hardware=auto`` found no accelerator that it can answer for."""


class ModelNotFound(ConfigError):
    """The architecture of the model that is trained could not be found."""


class NotModelled(MemfitError):
    """The launch asks for a combination whose memory memfit does not model."""


class NoPlanFits(MemfitError):
    """No value of the knobs that memfit may change makes the launch fit."""

    def __init__(self, message: str, plan: object = None) -> None:
        self.plan = plan
        """The best plan that was found (`planning.problem.Plan`), with proposals for what would fit."""
        super().__init__(message)

"""One tree of errors. Each message says what was asked, what is valid, and the override that fixes it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MemfitError(Exception):
    """Base of every error that memfit raises on purpose; its text is meant for the user."""


class ConfigError(MemfitError, ValueError):
    """The configuration, or a setting of memfit, is not valid."""


class UnknownName(ConfigError):
    """A name (hardware, model, framework, version) that memfit does not know."""

    def __init__(self, what: str, asked: str, known: Iterable[str], hint: str = "") -> None:
        self.what, self.asked, self.known = what, asked, tuple(sorted(known))
        close = difflib.get_close_matches(asked, self.known, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(
            f"unknown {what} {asked!r}.{guess} Known: {', '.join(self.known)}." + (f" {hint}" if hint else "")
        )


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

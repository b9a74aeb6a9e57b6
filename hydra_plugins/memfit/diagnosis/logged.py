"""The launch that a log itself shows: verl prints its composed config, Hydra the overrides of a job that failed, ``set -x`` the
command line. Nothing in a log is ever executed; a config is read as literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_plugins.memfit.diagnosis.line import LogLine

LAUNCH_NEEDLES = (b"'actor_rollout_ref': {", b"Error executing job with overrides: [", b" -m verl.", b" -m areal.")
_CONFIG_START = re.compile(r"\{'\w{1,60}': ")
_OVERRIDES = "Error executing job with overrides: "
_COMMAND = re.compile(r"^[+\s]*(?P<command>\S.{0,400}? -m (?P<module>(?:verl|areal)\.[\w.]{1,80})\s.*)")
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_MOST_CHARACTERS = 1 << 20
_MOST_LINES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedLaunch:
    """One launch as a log shows it: a whole config, or words of a command line."""

    line: int
    source: str
    """What it was read from, for the user."""
    config: Mapping[str, Any] | None = None
    words: tuple[str, ...] = ()
    command: str = ""
    """A command line as the shell printed it."""
    framework: str = "verl"

    @property
    def where(self) -> str:
        """What it was read from, and on which line."""
        return f"{self.source}, line {self.line} of the log"

    @property
    def rank(self) -> int:
        """How much it tells: a config is whole, Hydra's list is what the user typed, a command line may be cut."""
        return 3 if self.config is not None else 2 if self.words else 1


@dataclass(kw_only=True, slots=True)
class LaunchCollector:
    """Takes the lines of a log and keeps the launch of the latest run."""

    best: LoggedLaunch | None = None
    _text: list[str] = field(default_factory=list)
    _process: str = ""
    _line: int = 0
    _depth: int = 0
    _characters: int = 0
    _lines: int = 0

    @property
    def open(self) -> bool:
        """Whether a config is being read: the lines that follow belong to it."""
        return bool(self._text)

    def take(self, line: LogLine) -> bool:
        """Look at one line; whether a new run starts with it."""
        if self.open:
            self._continue(line)
            return False
        if "'actor_rollout_ref': {" in line.text and (start := _CONFIG_START.search(line.text)) is not None:
            self._begin(line, line.text[start.start() :])
            return True
        if _OVERRIDES in line.text:
            text = line.text.rpartition(_OVERRIDES)[2]
            self._overrides(line, text[: text.rfind("]") + 1])
            return False
        return (match := _COMMAND.search(line.text)) is not None and self._command(line, match)

    def _begin(self, line: LogLine, text: str) -> None:
        self._process, self._line, self._depth, self._characters, self._lines = line.process, line.number, 0, 0, 0
        self._append(text)

    def _continue(self, line: LogLine) -> None:
        self._lines += 1
        if line.process == self._process:
            self._append(line.text)
        elif self._lines > _MOST_LINES:
            self._text = []

    def _append(self, text: str) -> None:
        self._text.append(text)
        self._characters += len(text)
        bare = _QUOTED.sub("", text)
        self._depth += bare.count("{") - bare.count("}")
        if self._depth <= 0:
            self._finish()
        elif self._characters > _MOST_CHARACTERS or self._lines > _MOST_LINES:
            self._text = []

    def _finish(self) -> None:
        content = _literal("\n".join(self._text))
        self._text = []
        if isinstance(content, dict) and all(isinstance(key, str) for key in content):
            self._offer(LoggedLaunch(line=self._line, source="the config that verl printed", config=content), new=True)

    def _overrides(self, line: LogLine, text: str) -> None:
        words = _literal(text)
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            areal = any(word.startswith(("allocation_mode=", "gconfig.", "rollout.backend=")) for word in words)
            found = LoggedLaunch(
                line=line.number,
                source="Hydra's list of overrides",
                words=tuple(words),
                framework="areal" if areal else "verl",
            )
            self._offer(found, new=False)

    def _command(self, line: LogLine, match: re.Match[str]) -> bool:
        found = LoggedLaunch(
            line=line.number,
            source="the command line",
            command=match["command"].strip(),
            framework=match["module"].split(".")[0],
        )
        self._offer(found, new=True)
        return True

    def _offer(self, found: LoggedLaunch, *, new: bool) -> None:
        """Keep ``found`` where it tells more than what is known of the same run, or where it starts another one."""
        if self.best is None or found.rank >= self.best.rank or (new and found.source == self.best.source):
            self.best = found


def _literal(text: str) -> Any:
    """Return the Python literal ``text``; ``None`` for anything else. Nothing is evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None

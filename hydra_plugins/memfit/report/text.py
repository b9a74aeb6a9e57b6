"""A plan, or the reason why there is none, as text on a stream: a panel on a terminal, plain text elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.planning.problem import Change, Plan
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.json import all_warnings
from hydra_plugins.memfit.report.overrides import overrides

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def print_plan(plan: Plan, style: str = "full", *, stream: TextIO | None = None) -> None:
    """Write the report on ``plan``: ``full``, ``short`` or ``html`` (one line, with the number of warnings), ``off`` (nothing).

    ``stream`` is stderr when left out. Colours appear on a terminal only, and not under ``NO_COLOR``.
    """
    if style in ("short", "html"):
        count = len(all_warnings(plan))
        more = f" ({count} warning{'s' * (count > 1)}: memfit.report=full)" if count else ""
        _write(f"memfit: {words.launch(plan)}: {words.verdict(plan)}{more}\n", stream)
    elif style != "off":
        from hydra_plugins.memfit.report.panel import plan_panel  # lazy: rich costs tens of milliseconds

        _render(lambda console: plan_panel(plan, console), stream)


def print_error(error: MemfitError, style: str = "full", *, stream: TextIO | None = None) -> None:
    """Write why memfit stops, even when the report is ``off``; with a plan, also what would fit."""
    plan = getattr(error, "plan", None)
    if style in ("short", "html", "off"):
        _write(f"memfit: {error}\n", stream)
        return
    from hydra_plugins.memfit.report import panel

    if isinstance(plan, Plan):
        reason = words.refusal(plan) if plan.proposals else str(error)
        _render(lambda console: panel.plan_panel(plan, console, reason), stream)
        _write(proposal_text(plan), stream)
    else:
        _render(lambda console: panel.message_panel(str(error), console), stream)


def proposal_text(plan: Plan) -> str:
    """Return the smallest change that would make a plan fit, as lines to copy; empty where nothing would."""
    asked = proposals_to_ask(plan)
    if not asked:
        return ""
    pins = ", ".join(c.key for c in asked if c.key in plan.pinned)
    hints = [f"it releases the pinned {pins}"] if pins else []
    if any(change.kind != "neutral" for change in asked):
        hints.append("it changes training, and memfit.allow_semantic=true lets memfit do it")
    title = f"This would fit ({'; '.join(hints)}):" if hints else "This would fit:"
    return "\n".join([title, *(f"  {line}" for line in overrides(asked)), ""])


def proposals_to_ask(plan: Plan) -> list[Change]:
    """Return what the user has to change so that a plan fits; what else a proposal turns, memfit turns by itself."""
    return [c for c in plan.proposals if c.key in plan.pinned or c.kind != "neutral"] or list(plan.proposals)


def _render(build: Callable[[Console], RenderableType], stream: TextIO | None) -> None:
    from rich.console import Console

    stream = stream or sys.stderr
    if stream is None:  # a process without a stderr (pythonw, a daemon): there is nobody to tell
        return
    console = Console(file=stream, highlight=False, soft_wrap=False)
    with console.capture() as captured:
        console.print(build(console))
    _write(captured.get(), stream)


def _write(text: str, stream: TextIO | None) -> None:
    """Write what the stream can encode; a reader that is gone must not stop a launch."""
    stream = stream or sys.stderr
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        stream.write(text.encode(encoding, errors="replace").decode(encoding))
        stream.flush()

"""The layout of a report: as wide as the terminal allows, and in ASCII where the stream knows no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.breakdown import PhaseEstimate
from hydra_plugins.memfit.planning.problem import Change, Plan
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.json import all_warnings

MAX_WIDTH = 110
_MOST_PINS = 8
"""Pinned keys that are named; the record of the plan has all."""
_FRAME = 4
"""Columns of a panel's border and padding."""
_NUMBERS = 36
"""Columns that a phase's name, its numbers and the gaps between them take, without the bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyphs:
    """The characters that are not plain text."""

    full: str = "█"
    empty: str = "░"
    mark: str = "▶"
    bullet: str = "•"


UNICODE = Glyphs()
ASCII = Glyphs(full="#", empty=".", mark=">", bullet="-")


def plan_panel(plan: Plan, console: Console, refusal: str = "") -> Panel:
    """Return the whole report on one plan; ``refusal`` stands in for the verdict where the launch stops."""
    glyphs, width = _glyphs(console), _inner_width(console)
    colour = _colour(plan, refusal)
    parts = [
        Text(refusal or words.verdict(plan), style=f"bold {colour}"),
        _facts(plan),
        _phase_table(plan, glyphs, width, planned="at best" if refusal else "planned"),
        *_notes_below_table(plan),
        *_changes(plan, refusal),
        *_pinned(plan),
        *_bullets("warnings", all_warnings(plan), glyphs, "yellow"),
    ]
    return _framed(parts, f"memfit: {words.launch(plan)}", colour, console)


def message_panel(message: str, console: Console) -> Panel:
    """Return one error in a frame."""
    return _framed([Text(message)], "memfit", "red", console)


def _colour(plan: Plan, refusal: str) -> str:
    if refusal or not plan.fits:
        return "red"
    return "green" if plan.trains_the_same else "yellow"


def _framed(parts: Sequence[RenderableType], title: str, colour: str, console: Console) -> Panel:
    width = min(console.width, MAX_WIDTH)
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style=colour, width=width)


def _inner_width(console: Console) -> int:
    return min(console.width, MAX_WIDTH) - _FRAME


def _glyphs(console: Console) -> Glyphs:
    return ASCII if console.options.ascii_only else UNICODE


def _facts(plan: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, text in words.facts(plan).items():
        grid.add_row(label, Text(text))
    return Padding(grid, (1, 0))


def _phase_table(plan: Plan, glyphs: Glyphs, width: int, *, planned: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("", width=1)
    table.add_column("GiB by phase", no_wrap=True)
    for header in ("asked", planned, "budget") if plan.changes else ("needs", "budget"):
        table.add_column(header, justify="right", no_wrap=True)
    bar_width = min(30, width - _NUMBERS - (10 if plan.changes else 0))
    table.add_column("", no_wrap=True)
    for phase in plan.estimate.phases:
        table.add_row(*_phase_row(plan, phase, glyphs, bar_width), style=_phase_style(plan, phase))
    return table


def _phase_row(plan: Plan, phase: PhaseEstimate, glyphs: Glyphs, bar_width: int) -> list[Text | str]:
    binding = glyphs.mark if phase.name == plan.binding_phase.name else ""
    asked = [_asked(plan, phase.name)] if plan.changes else []
    return [
        binding,
        phase.name,
        *asked,
        _number(phase.whole_bytes),
        _number(phase.budget_bytes),
        _bar(phase, glyphs, bar_width),
    ]


def _asked(plan: Plan, name: str) -> Text:
    """Return what the launch as it was asked for needs in a phase, red where that does not fit."""
    for phase in plan.requested.phases:
        if phase.name == name:
            return Text(_number(phase.whole_bytes), style="" if phase.fits else "red")
    return Text("-")


def _number(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _phase_style(plan: Plan, phase: PhaseEstimate) -> str:
    if not phase.fits:
        return "red"
    return "bold" if phase.name == plan.binding_phase.name else ""


def _bar(phase: PhaseEstimate, glyphs: Glyphs, bar_width: int) -> str:
    share = phase.whole_bytes / phase.budget_bytes if phase.budget_bytes > 0 else float("inf")
    percent = f"{share:5.0%}" if share < 10 else " >10x"
    room = bar_width - len(percent) - 1
    if room < 4:
        return percent
    num_full = min(room, max(0, round(share * room))) if share < 10 else room
    return glyphs.full * num_full + glyphs.empty * (room - num_full) + " " + percent


def _notes_below_table(plan: Plan) -> list[RenderableType]:
    phase = plan.binding_phase
    lines: list[RenderableType] = [Text(words.largest(phase), style="dim")]
    if plan.changes and not plan.requested.fits:
        lines.append(Text(f"as requested it does not fit: {words.obstacle(plan.requested)}", style="dim"))
    explained = (words.unset(plan), words.budgets(plan))
    return [*lines, *(Text(text, style="dim") for text in explained if text)]


def _changes(plan: Plan, refusal: str) -> list[RenderableType]:
    if not plan.changes:
        return []
    blocks = [block for change in plan.changes for block in _change(change)]
    if refusal:
        return [Text("\ntried, and not enough", style="bold"), *blocks]
    training = Text(words.training(plan), style="green" if plan.trains_the_same else "bold yellow")
    return [Text("\nchanged", style="bold"), *blocks, training]


def _change(change: Change) -> list[RenderableType]:
    colour = "cyan" if change.kind == "neutral" else "bold yellow"
    what = Text.assemble((words.step(change), colour), ("  " + change.why if change.why else ""))
    if change.kind != "neutral":
        what.append("  (changes training)", style="bold yellow")
    return [Padding(Text(change.key, overflow="fold"), (0, 0, 0, 2)), Padding(what, (0, 0, 0, 6))]


def _pinned(plan: Plan) -> list[RenderableType]:
    if not plan.pinned:
        return []
    keys = Text(words.listed(plan.pinned, _MOST_PINS), overflow="fold")
    return [Text("\npinned, left as they are", style="bold"), Padding(keys, (0, 0, 0, 2))]


def _bullets(title: str, lines: Iterable[str], glyphs: Glyphs, style: str) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(glyphs.bullet, Text(line, style=style))
    return [Text(f"\n{title}", style="bold"), Padding(grid, (0, 0, 0, 2))] if grid.row_count else []

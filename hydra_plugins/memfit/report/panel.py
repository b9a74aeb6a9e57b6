"""The layout of a report: as wide as the terminal allows, and in ASCII where the stream knows no more.

The lines are laid out here, wrapped by rich, and framed as one text: rich's own tables and paddings, nested, take five
times as long, and every launch waits for its report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
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
_PHASES = "GiB by phase"


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
    page, colour = _Page(console), _colour(plan, refusal)
    lines = [
        *page.wrapped(refusal or words.verdict(plan), style=f"bold {colour}"),
        *_facts(plan, page),
        *_phase_table(plan, page, planned="at best" if refusal else "planned"),
        *_notes_below_table(plan, page),
        *_changes(plan, page, refusal),
        *_pinned(plan, page),
        *_bullets("warnings", all_warnings(plan), page, "yellow"),
    ]
    return page.framed(lines, f"memfit: {words.launch(plan)}", colour)


def message_panel(message: str, console: Console) -> Panel:
    """Return one error in a frame."""
    page = _Page(console)
    return page.framed(page.wrapped(message), "memfit", "red")


class _Page:
    """The room between the frames of one stream's report."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._outer = min(console.width, MAX_WIDTH)
        self.width = self._outer - _FRAME
        self.glyphs = ASCII if console.options.ascii_only else UNICODE

    def wrapped(self, text: str | Text, *, hang: str | Text = "", style: str = "") -> Iterator[Text]:
        """Yield the lines of ``text``: the first behind ``hang``, the others below it."""
        whole = Text(text, style=style) if isinstance(text, str) else text
        first = Text(hang) if isinstance(hang, str) else hang
        indent = Text(" " * len(first))
        for number, line in enumerate(whole.wrap(self._console, max(1, self.width - len(first)), overflow="fold")):
            yield Text.assemble(indent if number else first, line)

    def framed(self, lines: Iterable[Text], title: str, colour: str) -> Panel:
        """Return the lines in a frame; one that is wider than the page is cut off."""
        body = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
        return Panel(body, title=Text(title), title_align="left", border_style=colour, width=self._outer)


def _colour(plan: Plan, refusal: str) -> str:
    if refusal or not plan.fits:
        return "red"
    return "green" if plan.trains_the_same else "yellow"


def _facts(plan: Plan, page: _Page) -> Iterator[Text]:
    facts = words.facts(plan)
    label_width = max(map(len, facts))
    yield Text()
    for label, text in facts.items():
        yield from page.wrapped(text, hang=Text(f"{label:{label_width}}  ", style="dim"))
    yield Text()


def _phase_table(plan: Plan, page: _Page, *, planned: str) -> Iterator[Text]:
    heads = ("asked", planned, "budget") if plan.changes else ("needs", "budget")
    bar_width = min(30, page.width - _NUMBERS - (10 if plan.changes else 0))
    phases, binding = plan.estimate.phases, plan.binding_phase.name
    numbers: list[list[str | Text]] = [
        [*_asked(plan, phase.name), _number(phase.whole_bytes), _number(phase.budget_bytes)] for phase in phases
    ]
    widths = [max(map(len, column)) for column in zip(heads, *numbers, strict=True)]
    name_width = max(len(_PHASES), *(len(phase.name) for phase in phases))
    yield _row(" ", f"{_PHASES:{name_width}}", heads, widths, "", style="dim")
    for phase, row in zip(phases, numbers, strict=True):
        mark = page.glyphs.mark if phase.name == binding else " "
        line = _row(mark, f"{phase.name:{name_width}}", row, widths, _bar(phase, page.glyphs, bar_width))
        line.stylize_before("red" if not phase.fits else "bold" if phase.name == binding else "")
        yield line


def _row(
    mark: str, name: str, numbers: Sequence[str | Text], widths: Sequence[int], bar: str, *, style: str = ""
) -> Text:
    line = Text(f"{mark}  {name}", style=style)
    for number, width in zip(numbers, widths, strict=True):
        line.append(" " * (2 + width - len(number))).append(number)
    return line.append(f"  {bar}")


def _asked(plan: Plan, name: str) -> list[Text]:
    """Return what the launch as it was asked for needs in a phase, red where that does not fit; nothing if nothing changed."""
    if not plan.changes:
        return []
    for phase in plan.requested.phases:
        if phase.name == name:
            return [Text(_number(phase.whole_bytes), style="" if phase.fits else "red")]
    return [Text("-")]


def _number(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _bar(phase: PhaseEstimate, glyphs: Glyphs, bar_width: int) -> str:
    share = phase.whole_bytes / phase.budget_bytes if phase.budget_bytes > 0 else float("inf")
    percent = f"{share:5.0%}" if share < 10 else " >10x"
    room = bar_width - len(percent) - 1
    if room < 4:
        return percent
    num_full = min(room, max(0, round(share * room))) if share < 10 else room
    return glyphs.full * num_full + glyphs.empty * (room - num_full) + " " + percent


def _notes_below_table(plan: Plan, page: _Page) -> Iterator[Text]:
    phase = plan.binding_phase
    notes = [words.largest(phase)]
    if plan.changes and not plan.requested.fits:
        notes.append(f"as requested it does not fit: {words.obstacle(plan.requested)}")
    for note in (*notes, words.unset(plan), words.budgets(plan)):
        if note:
            yield from page.wrapped(note, style="dim")


def _changes(plan: Plan, page: _Page, refusal: str) -> Iterator[Text]:
    if not plan.changes:
        return
    yield from _titled(page, "tried, and not enough" if refusal else "changed")
    for change in plan.changes:
        yield from page.wrapped(change.key, hang="  ")
        yield from page.wrapped(_change(change), hang="      ")
    if not refusal:
        yield from page.wrapped(words.training(plan), style="green" if plan.trains_the_same else "bold yellow")


def _change(change: Change) -> Text:
    colour = "cyan" if change.kind == "neutral" else "bold yellow"
    what = Text.assemble((words.step(change), colour), ("  " + change.why if change.why else ""))
    return what if change.kind == "neutral" else what.append("  (changes training)", style="bold yellow")


def _pinned(plan: Plan, page: _Page) -> Iterator[Text]:
    if plan.pinned:
        yield from _titled(page, "pinned, left as they are")
        yield from page.wrapped(words.listed(plan.pinned, _MOST_PINS), hang="  ")


def _bullets(title: str, lines: Sequence[str], page: _Page, style: str) -> Iterator[Text]:
    if lines:
        yield from _titled(page, title)
    for line in lines:
        yield from page.wrapped(line, hang=f"  {page.glyphs.bullet} ", style=style)


def _titled(page: _Page, title: str) -> Iterator[Text]:
    yield Text()
    yield from page.wrapped(title, style="bold")

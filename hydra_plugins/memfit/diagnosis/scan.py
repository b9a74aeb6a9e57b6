"""Reads a log and collects its failures. Blocks without a known message are skipped undecoded: gigabytes take seconds."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

from hydra_plugins.memfit.diagnosis.amount import SIZE, Amount, parse_amount
from hydra_plugins.memfit.diagnosis.catalogue import NEEDLES, OTHER_PROCESS, ROWS
from hydra_plugins.memfit.diagnosis.finding import Buffer, Finding
from hydra_plugins.memfit.diagnosis.kinds import KINDS
from hydra_plugins.memfit.diagnosis.line import LogLine, clean
from hydra_plugins.memfit.diagnosis.logged import LAUNCH_NEEDLES, LaunchCollector, LoggedLaunch
from hydra_plugins.memfit.diagnosis.phases import RAY, Frame, frame_in, innermost, phase_of
from hydra_plugins.memfit.diagnosis.stream import BinaryLog, Block, blocks

_MOST_FRAMES = 80
_MOST_PROCESSES = 4096
_MOST_FINDINGS = 64
_FOLLOWED_LINES = 400
_NEAR_LINES = 5
_TEXT = 600
_STEP = re.compile(rb"step:(\d{1,9}) - ")
_TRACED = (b'File "', b"ray::", b"Traceback (most", b".py:")
_BUFFER_SIZE = re.compile(rf"^\s*(?:\d{{1,3}}\. |Buffer \d+:)?\s*Size: ({SIZE})")
_SHAPE = re.compile(r"^\s*Shape: ([a-z0-9]{1,8}\[[\d,]{0,80}\])")
_OPERATOR = re.compile(r'op_name="([^"]{1,200})')
_HOT = (*NEEDLES, *LAUNCH_NEEDLES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What was read in one log."""

    findings: tuple[Finding, ...]
    """Failures of the last run in the log that has any, in the order of their first lines."""
    runs: int
    """Launches with failures in this log: it may hold several attempts."""
    num_bytes: int
    num_lines: int
    launch: LoggedLaunch | None
    """The launch that the log itself shows, where it does."""
    notes: tuple[str, ...]

    @property
    def cause(self) -> Finding | None:
        """The first failure that is not known as the consequence of another, else the first one."""
        ordered = sorted(self.findings, key=lambda finding: (finding.kind.consequence, finding.line))
        return ordered[0] if ordered else None


def scan(file: BinaryLog) -> Scan:
    """Read the log to its end, in bounded memory."""
    notes: list[str] = []
    reader = _Reader()
    for block in blocks(file, notes):
        reader.take(block)
    return Scan(
        findings=tuple(reader.findings) or reader.earlier,
        runs=reader.runs + bool(reader.findings),
        num_bytes=reader.num_bytes,
        num_lines=reader.num_lines,
        launch=reader.collector.best if reader.findings or not reader.earlier else reader.earlier_launch,
        notes=tuple(notes),
    )


@dataclass(kw_only=True, slots=True)
class _Followed:
    """The lines behind a message of the XLA compiler: its table."""

    finding: Finding
    process: str
    remaining: int = _FOLLOWED_LINES


@dataclass(kw_only=True, slots=True)
class _Reader:
    findings: list[Finding] = field(default_factory=list)
    earlier: tuple[Finding, ...] = ()
    earlier_launch: LoggedLaunch | None = None
    runs: int = 0
    num_bytes: int = 0
    num_lines: int = 0
    step: int | None = None
    collector: LaunchCollector = field(default_factory=LaunchCollector)
    frames: OrderedDict[str, deque[Frame]] = field(default_factory=OrderedDict)
    followed: _Followed | None = None
    latest: Finding | None = None
    before: Block | None = None
    """The block before, where it was skipped: a traceback may begin in it."""

    def take(self, block: Block) -> None:
        """Read one block, or skip it."""
        self.num_bytes += len(block.data)
        self.num_lines = block.first_line + block.data.count(b"\n") - (block.data.endswith(b"\n"))
        hot = any(needle in block.data for needle in _HOT)
        if not hot and self.followed is None and not self.collector.open:
            self._note_step(block.data)
            self.before = block
            return
        if self.before is not None:
            self._lines(self.before)
            self.before = None
        self._lines(block)

    def _note_step(self, data: bytes) -> None:
        last = data.rfind(b"step:")
        match = _STEP.match(data, last) if last >= 0 else None
        self.step = int(match[1]) if match else self.step

    def _lines(self, block: Block) -> None:
        number = block.first_line
        for part in block.data.splitlines(keepends=True):
            self._line(part, number)
            number += part.endswith(b"\n")

    def _line(self, raw: bytes, number: int) -> None:
        needle = next((n for n in _HOT if n in raw), None)
        traced = any(mark in raw for mark in _TRACED)
        if needle is None and not traced and self.followed is None and not self.collector.open:
            if b"step:" in raw:
                self._note_step(raw)
            return
        line = clean(raw, number, around=raw.find(needle) if needle else 0)
        before = self.collector.best
        if self.collector.take(line) and self.findings:
            self._new_run(before)
        if traced:
            self._trace(line)
        if self.followed is not None:
            self._follow(self.followed, line)
        if needle is not None:
            self._recognise(raw, line)

    def _new_run(self, launch: LoggedLaunch | None) -> None:
        """A launch after failures is the next attempt; ``launch`` is what was known of the one before."""
        self.runs += 1
        self.earlier, self.earlier_launch = tuple(self.findings), launch
        self.findings = []
        self.frames.clear()
        self.step = None

    def _trace(self, line: LogLine) -> None:
        if "Traceback (most recent call last)" in line.text:
            self.frames.pop(line.process, None)
        frame = frame_in(line.text)
        if frame is None:
            return
        if self.latest is not None and frame.file == RAY and line.number - self.latest.line <= _NEAR_LINES:
            self.latest.phase = self.latest.phase or phase_of([frame])  # Ray names the task behind the message
        if line.process not in self.frames and len(self.frames) >= _MOST_PROCESSES:
            self.frames.popitem(last=False)
        self.frames.setdefault(line.process, deque(maxlen=_MOST_FRAMES)).append(frame)

    def _recognise(self, raw: bytes, line: LogLine) -> None:
        for row in ROWS:
            if row.needle in raw and (read := row.read(line.text)) is not None:
                frames = list(self.frames.pop(line.process, ()))
                kind, (amounts, others) = KINDS[row.kind], _holders(_amounts(read[0]), line.text)
                finding = Finding(
                    kind=kind,
                    line=line.number,
                    text=_shown(line.text),
                    phase=phase_of(frames) or kind.phase,
                    function=innermost(frames),
                    functions=tuple(frame.function for frame in frames),
                    step=self.step,
                    amounts=amounts,
                    numbers=read[1],
                    others=others,
                    processes={line.process} if line.process else set(),
                    messages=line.repeats,
                )
                self._add(finding)
                if row.kind == "xla_hbm":
                    self.followed = _Followed(finding=finding, process=line.process)
                return

    def _add(self, finding: Finding) -> None:
        """Keep a failure; where it is known of another process, or was said before, add to that."""
        known = next((f for f in self.findings if f.kind is finding.kind and _same(f, finding)), None)
        self.latest = known or finding
        if known is None:
            self.findings += [finding] if len(self.findings) < _MOST_FINDINGS else []
            return
        known.messages += finding.messages
        if len(known.processes) < _MOST_PROCESSES:
            known.processes |= finding.processes
        known.phase = known.phase or finding.phase
        known.function, known.functions = known.function or finding.function, known.functions or finding.functions
        known.numbers = known.numbers or finding.numbers
        if not known.amounts:
            known.amounts, known.others = finding.amounts, finding.others

    def _follow(self, followed: _Followed, line: LogLine) -> None:
        followed.remaining -= 1
        if line.process == followed.process:
            _read_table(followed.finding, line.text)
        if followed.remaining <= 0 or len(followed.finding.buffers) > 3:
            self.followed = None


def _same(known: Finding, new: Finding) -> bool:
    """Whether two failures of one kind are one: the same phase, or one of them does not know its phase."""
    return known.phase == new.phase or known.phase is None or new.phase is None


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT else text[: _TEXT - 4] + " ..."


def _amounts(sizes: dict[str, Amount]) -> dict[str, Amount]:
    """Return the sizes under their common names, whatever the version of the message."""
    sizes = dict(sizes)
    whole = sizes.pop("reserved_all", None)
    if whole is not None and "allocated" in sizes:
        unused = max(0, whole.num_bytes - sizes["allocated"].num_bytes)
        sizes["reserved"] = Amount(num_bytes=unused, slack_bytes=whole.slack_bytes + sizes["allocated"].slack_bytes)
    return sizes


def _holders(sizes: dict[str, Amount], text: str) -> tuple[dict[str, Amount], tuple[tuple[int, Amount], ...]]:
    """Return the sizes with that of this process, and the other processes on the device."""
    listed = [(int(pid), parse_amount(size)) for pid, size in OTHER_PROCESS.findall(text)]
    allocated = sizes.get("allocated")
    alone = allocated is not None and "process" not in sizes and len(listed) == 1
    if alone and allocated is not None and listed[0][1].num_bytes >= allocated.num_bytes:
        return {**sizes, "process": listed[0][1]}, ()  # in a container torch does not know its own number
    return sizes, tuple(listed)


def _read_table(finding: Finding, text: str) -> None:
    """Read one line of XLA's table of the largest allocations."""
    size = _BUFFER_SIZE.match(text)
    if size is not None:
        finding.buffers.append(Buffer(size=parse_amount(size[1])))
    elif finding.buffers and not finding.buffers[-1].shape and (shape := _SHAPE.match(text)) is not None:
        finding.buffers[-1] = replace(finding.buffers[-1], shape=shape[1])
    elif finding.buffers and not finding.buffers[-1].operator and (operator := _OPERATOR.search(text)) is not None:
        finding.buffers[-1] = replace(finding.buffers[-1], operator=operator[1])

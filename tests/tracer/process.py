"""The life of a training process as its allocator sees it: the requests of a trace, replayed for steps of varied lengths.

One case is traced at two numbers of tokens. Where both logs hold the same requests in the same order, and each size is a
straight line between them, the requests of any other length follow; a case of which this is not true is refused. A step
is then any sequence of forward passes and micro-batches, each of its own length, with verl's calls of ``empty_cache``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from tracer.allocator import NO_LIMIT, CachingAllocator, OutOfMemory, rounded
from tracer.case import Case

if TYPE_CHECKING:
    from tracer.report import Recording

RESOLUTION = 0.004
"""Of the live bytes: how closely the smallest limit is searched."""
STEPS, MICRO_BATCHES = 2, 4
FEWEST_TOKENS, MOST_TOKENS = 1 << 10, 1 << 16
"""A case that fills a device with fewer or more tokens on a rank is not replayed on it: nobody trains so."""


class Request(NamedTuple):
    """One entry of a trace: ``base`` + ``slope`` x tokens bytes, or a release where ``base`` is ``None``."""

    key: int
    base: float | None = None
    slope: float = 0.0
    stream: str = "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What a case asks of its allocator, part by part."""

    tokens: int
    weights: tuple[Request, ...]
    optimizer_states: tuple[Request, ...]
    """Made by the first optimizer step, among what is in the cache then."""
    forward: tuple[Request, ...]
    first: tuple[Request, ...]
    """The first micro-batch after an optimizer step."""
    next: tuple[Request, ...]
    """Any later one: gradients are resident."""
    step: tuple[Request, ...]


class Act(NamedTuple):
    """A part of the script at a length, or one of ``load``, ``states``, ``unload`` and ``empty_cache``."""

    name: str
    tokens: int = 0


def script(case: Case) -> Script:
    """Trace a case that trains, twice, and return its requests."""
    case = replace(case, micro_batches=2)
    small = max(case.ulysses, case.sequences) * (case.tokens // max(case.ulysses, case.sequences) // 2)
    long, short = _recorded(case), _recorded(replace(case, tokens=small))
    end = long.marks[-1][1]
    if long.marks != short.marks or long.log[:end] != short.log[:end]:
        raise ValueError(f"the requests of {case.changed()} depend on the number of tokens")
    marks = dict(long.marks)
    first, second = long.micro_batch_ends

    def part(start: int, end: int) -> tuple[Request, ...]:
        return tuple(_request(long, short, case.tokens, small, *entry) for entry in long.log[start:end])

    resident = _alive(long, marks[_forward_mark(case)])
    states = {i for i in resident if long.blocks[i].label == "optimizer_states"}
    return Script(
        tokens=case.tokens,
        weights=tuple(_request(long, short, case.tokens, small, i, 1) for i in resident if i not in states),
        optimizer_states=tuple(_request(long, short, case.tokens, small, i, 1) for i in resident if i in states),
        forward=part(marks[_forward_mark(case)], marks["update"]),
        first=part(marks["update"], first),
        next=part(first, second),
        step=part(marks["optimizer_step"], marks["end"]),
    )


def _forward_mark(case: Case) -> str:
    return "values" if case.role == "critic" else "log_prob"


def _recorded(case: Case) -> Recording:
    from tracer.engine import session
    from tracer.report import Recording

    recording = Recording()
    with session(case, recording) as engine, recording:
        engine.run()
    return recording


def _alive(recording: Recording, position: int) -> list[int]:
    alive: dict[int, None] = {}
    for index, change in recording.log[:position]:
        if change > 0:
            alive[index] = None
        else:
            del alive[index]
    return list(alive)


def _request(long: Recording, short: Recording, tokens: int, small: int, index: int, change: int) -> Request:
    from tracer.report import STREAMS

    if change < 0:
        return Request(index)
    block = long.blocks[index]
    slope = (block.num_bytes - short.blocks[index].num_bytes) / (tokens - small)
    return Request(index, block.num_bytes - slope * tokens, slope, STREAMS.get(block.scope, "compute"))


# -- steps ----------------------------------------------------------------------------------------------------------
def lengths(kind: str, tokens: int, count: int, draw: random.Random) -> list[int]:
    """
    Return the tokens of ``count`` micro-batches that may hold ``tokens``; one of them, not the first, is full.

    ``dynamic``: packs of a token budget, which verl makes of like size, so that they are as full as the number of packs
    allows. ``static``: a fixed number of sequences, whose responses are log-normal (sigma 0.6 about 0.3 of the longest).
    ``padded``: every one is full.
    """
    if kind == "padded":
        return [tokens] * count
    if kind == "dynamic":
        packs = draw.randint(2, 8)
        level = draw.uniform((packs - 1) / packs, 1)
        drawn = [level * draw.uniform(0.97, 1) for _ in range(count)]
    else:
        drawn = [sum(_sequence(draw) for _ in range(4)) / 4 for _ in range(count)]
    drawn[draw.randrange(1, count)] = 1.0
    return [max(1, int(tokens * share)) for share in drawn]


def _sequence(draw: random.Random) -> float:
    prompt, response = draw.uniform(0.02, 0.15), 0.3 * math.exp(draw.gauss(0, 0.6))
    return min(1.0, prompt + response)


def filling(case: Case, script: Script, num_bytes: int) -> int | None:
    """Return the tokens of a full micro-batch with which the live peak is about ``num_bytes``; ``None`` where none is."""
    step = math.lcm(case.ulysses, case.sequences)
    low, high = 0, 1
    while _live_peak(script, high * step) < num_bytes:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if _live_peak(script, middle * step) < num_bytes else (low, middle)
    return low * step if FEWEST_TOKENS <= low * step / case.ulysses <= MOST_TOKENS else None


def _live_peak(script: Script, tokens: int) -> int:
    """Return the most that is live in a pass without gradients or in an update that accumulates them, whatever the allocator."""
    states = (*script.weights, *script.optimizer_states)
    return max(_most(tokens, *states, *script.forward), _most(tokens, *states, *script.first, *script.next))


def _most(tokens: int, *requests: Request) -> int:
    sizes: dict[int, int] = {}
    live = peak = 0
    for request in requests:
        if request.base is None:
            live -= sizes.pop(request.key, 0)
        elif (asked := int(request.base + request.slope * tokens + 0.5)) > 0:
            sizes[request.key] = rounded(asked)
            live += sizes[request.key]
            peak = max(peak, live)
    return peak


def acts(case: Case, tokens: int, *, kind: str, offload: bool) -> Iterator[Act]:
    """Yield what a process does in its first steps; drawn from the case, its tokens and the kind alone."""
    other = "" if tokens == case.tokens else f" {tokens}"
    seed = hashlib.sha256(f"{sorted(case.changed().items())}{other} {kind} {offload}".encode()).digest()
    draw = random.Random(seed)
    yield Act("load")
    for number in range(STEPS):
        if offload and number:
            yield Act("load")
        yield from (Act("forward", t) for t in lengths(kind, tokens, MICRO_BATCHES, draw))
        if offload:
            yield from (Act("unload"), Act("empty_cache"), Act("load"))
            yield from [Act("states")] if number else []
        for index, t in enumerate(lengths(kind, tokens, MICRO_BATCHES, draw)):
            yield Act("next" if index else "first", t)
        yield from [Act("states")] if number == 0 else []
        yield Act("step")
        yield from [Act("unload")] if offload else []
        yield Act("empty_cache")


class Process:
    """Plays acts on an allocator and counts what is live."""

    def __init__(self, script: Script, allocator: CachingAllocator) -> None:
        self.script, self.allocator = script, allocator
        self.live = self.peak_live = 0
        self._sizes: dict[int, int] = {}

    def play(self, act: Act) -> None:
        """Play one act; raises `OutOfMemory`."""
        if act.name == "empty_cache":
            self.allocator.empty_cache()
        elif act.name == "unload":
            for request in (*self.script.weights, *self.script.optimizer_states):
                if request.key in self._sizes:
                    self._release(request.key)
        else:
            names = {"load": "weights", "states": "optimizer_states"}
            for request in getattr(self.script, names.get(act.name, act.name)):
                if request.base is None:
                    self._release(request.key)
                else:
                    self._allocate(request, int(request.base + request.slope * act.tokens + 0.5))

    def _allocate(self, request: Request, num_bytes: int) -> None:
        if num_bytes <= 0:
            return
        self.allocator.allocate(request.key, num_bytes, request.stream)
        self._sizes[request.key] = rounded(num_bytes)
        self.live += self._sizes[request.key]
        self.peak_live = max(self.peak_live, self.live)

    def _release(self, key: int) -> None:
        if key in self._sizes:
            self.allocator.release(key)
            self.live -= self._sizes.pop(key)


def run(script: Script, plan: list[Act], *, expandable: bool, limit: int = NO_LIMIT) -> Process:
    """
    Play a plan below a limit; raises `OutOfMemory`.

    What is loaded first lies in ordinary segments whatever ``expandable`` says: verl (0.6 and later) switches expandable
    segments on in its trainer after the first weight sync.
    """
    allocator = CachingAllocator(limit)
    process = Process(script, allocator)
    for act in plan:
        process.play(act)
        allocator.expandable = expandable
    return process


def needed(script: Script, plan: list[Act], *, expandable: bool) -> tuple[int, int]:
    """Return the live peak and the smallest limit that the plan survives, in bytes."""
    free = run(script, plan, expandable=expandable)
    low, high = free.peak_live, free.allocator.peak_reserved
    if _survives(script, plan, expandable, low):
        return free.peak_live, low
    while high - low > RESOLUTION * free.peak_live:
        middle = (low + high) // 2
        low, high = (low, middle) if _survives(script, plan, expandable, middle) else (middle, high)
    return free.peak_live, high


def _survives(script: Script, plan: list[Act], expandable: bool, limit: int) -> bool:
    try:
        run(script, plan, expandable=expandable, limit=limit)
    except OutOfMemory:
        return False
    return True

"""Replayed training steps below a limit, and the margin that follows from them (tests/data/reserved.json)."""

from __future__ import annotations

import json

import pytest

from hydra_plugins.memfit.memory.allocator import (
    CAUTIOUS_MARGIN,
    DEFAULT_MARGIN,
    EXPANDABLE,
    FRAGMENTATION_SHARE,
    ORDINARY,
)
from support.reserved_validation import (
    CAPACITIES,
    Replay,
    chosen,
    covered,
    filling,
    known_fits,
    margins,
    quantile,
    refused,
    replays,
)
from tracer.allocator import CachingAllocator, OutOfMemory
from tracer.case import Case
from tracer.make_reserved import AS_TRACED, LIVE_BYTES, drawn
from tracer.process import Act, Process, Request, Script, lengths, needed, run
from tracer.process import filling as filling_tokens


def test_every_stored_replay_is_of_a_case_of_the_draw() -> None:
    """A stored case is one of those drawn, with and without offload, ordinary and expandable, at every kind of lengths."""
    known = {json.dumps(case.changed()): case for case in drawn()}
    found: dict[tuple[str, str], set[tuple[object, ...]]] = {}
    for replay in replays():
        row = replay.row
        kinds = found.setdefault((json.dumps(row["case"]), replay.device), set())
        kinds.add((row["lengths"], row["offload"], row["expandable"]))
    assert len({case for case, device in found if device != AS_TRACED}) >= 10
    for (case, _), kinds in found.items():
        assert len(kinds) == (4 if known[case].padded else 8)


def test_tensors_fill_the_device_that_a_replay_is_for() -> None:
    """The live peak is most of a device, unless the optimizer step or the whole life of a case needs a little more."""
    for replay in (*filling(expandable=True), *filling(expandable=False)):
        assert 0.98 < replay.row["live_bytes"] / LIVE_BYTES[replay.device] < 1.25, replay.row


def test_a_limit_is_never_below_what_is_live() -> None:
    """No step survives below its own tensors, and expandable segments never need more than a few percent above them."""
    for replay in replays():
        assert replay.above_live >= 0
        assert replay.above_live < 0.05 or not replay.expandable, replay.row


def pairs() -> list[tuple[Replay, Replay]]:
    """Return ordinary and expandable segments of the same process."""
    key = lambda r: json.dumps([r.row["case"], r.device, r.row["lengths"], r.row["offload"]])  # noqa: E731
    ordinary = {key(r): r for r in replays() if not r.expandable}
    return [(ordinary[key(r)], r) for r in replays() if r.expandable]


def test_expandable_segments_need_less() -> None:
    """In nine of ten processes expandable segments need less above the live bytes than ordinary ones."""
    less = [ordinary.above_live > expandable.above_live for ordinary, expandable in pairs()]
    assert sum(less) >= 0.9 * len(less)


@pytest.mark.parametrize("expandable", [True, False])
def test_the_term_is_the_median_on_80_gb(expandable: bool) -> None:
    """The planned share is the median of the replays that fill 80 GB, in whole percents and at least one."""
    median = quantile([r.share for r in chosen(expandable=expandable, device="80 GB")], 0.5)
    assert FRAGMENTATION_SHARE[expandable] == max(0.01, round(median, 2))


def test_the_default_margins_cover_what_the_page_says() -> None:
    """Nearly every combination of errors with expandable segments on 80 GB; with ordinary ones the cautious margin, 95 %."""
    assert covered(DEFAULT_MARGIN[EXPANDABLE], expandable=True) >= 0.99
    assert covered(DEFAULT_MARGIN[ORDINARY], expandable=False) >= 0.8
    assert covered(CAUTIOUS_MARGIN, expandable=False) >= 0.95 > covered(CAUTIOUS_MARGIN - 0.01, expandable=False)
    for device in CAPACITIES:
        assert list(margins(expandable=True, device=device)) == sorted(margins(expandable=True, device=device))


@pytest.mark.slow
def test_the_default_margin_is_the_largest_that_refuses_no_known_run() -> None:
    """With ordinary segments the next whole percent would refuse a public run that trained; expandable ones have room."""
    assert len(known_fits()[False]) > 10
    assert (
        refused(DEFAULT_MARGIN[ORDINARY], expandable=False)
        == refused(DEFAULT_MARGIN[EXPANDABLE], expandable=True)
        == []
    )
    assert refused(DEFAULT_MARGIN[ORDINARY] + 0.01, expandable=False) != []


@pytest.mark.parametrize(("q", "value"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.9, 4), (1.0, 4), (0.0, 1)])
def test_a_quantile_is_a_value_that_occurs(q: float, value: int) -> None:
    """The smallest value that the share does not exceed."""
    assert quantile([4, 2, 1, 3], q) == value


# -- the process ----------------------------------------------------------------------------------------------------
MIB = 1 << 20


def part(*requests: tuple[int, float] | int) -> tuple[Request, ...]:
    """Return (key, MiB a thousand tokens) requests and releases of bare keys."""
    return tuple(Request(r) if isinstance(r, int) else Request(r[0], 0.0, r[1] * MIB / 1000) for r in requests)


SCRIPT = Script(
    tokens=1000,
    weights=(Request(1, 100.0 * MIB),),
    optimizer_states=(Request(2, 200.0 * MIB),),
    forward=part((3, 300), 3),
    first=part((4, 300), (5, 300), 4, 5),
    next=part((4, 300), (5, 300), 4, 5),
    step=(),
)


def test_a_longer_micro_batch_after_a_shorter_one_needs_more_than_its_tensors() -> None:
    """Ordinary segments of the shorter one are given back when a full device needs them: only the live bytes count."""
    plan = [Act("load"), Act("first", 900), Act("next", 1000)]
    live, limit = needed(SCRIPT, plan, expandable=False)
    assert live == 700 * MIB
    assert limit == live
    assert run(SCRIPT, plan, expandable=False).allocator.peak_reserved == 100 * MIB + 2 * 270 * MIB + 2 * 300 * MIB


def test_states_that_are_made_in_cached_memory_hold_its_segment() -> None:
    """Adam's states take a part of a cached segment; what is left of it does not serve the next, larger micro-batch."""
    plan = [Act("load"), Act("first", 900), Act("states"), Act("next", 1000)]
    live, limit = needed(SCRIPT, plan, expandable=False)
    assert live == 900 * MIB
    assert limit > 960 * MIB
    assert needed(SCRIPT, plan, expandable=True)[1] < 930 * MIB


def test_a_limit_below_the_live_bytes_fails() -> None:
    """The replay raises what the allocator raises."""
    with pytest.raises(OutOfMemory):
        run(SCRIPT, [Act("load"), Act("first", 1000)], expandable=True, limit=600 * MIB)


def test_offloaded_states_leave_the_device() -> None:
    """``unload`` releases weights and states, and nothing else."""
    process = Process(SCRIPT, CachingAllocator())
    for act in (Act("load"), Act("states"), Act("unload")):
        process.play(act)
    assert process.live == 0
    assert process.peak_live == 300 * MIB


@pytest.mark.parametrize("kind", ["dynamic", "static", "padded"])
def test_one_micro_batch_of_a_step_is_full_and_none_is_more(kind: str) -> None:
    """Whatever the lengths, the step that is planned for occurs: one micro-batch, not the first, has every token."""
    import random

    for seed in range(20):
        found = lengths(kind, 8192, 4, random.Random(seed))
        assert max(found) == 8192
        assert max(found[1:]) == 8192
        assert min(found) > 0


@pytest.mark.parametrize(("asked", "reached"), [(20, False), (500, True), (2000, True), (3000, False)])
def test_as_many_tokens_as_fill_a_device(asked: int, reached: bool) -> None:
    """The live peak decides; nothing where fewer tokens than anybody trains with, or more, would be needed."""
    script = Script(
        tokens=1000,
        weights=(Request(1, 100.0 * MIB),),
        optimizer_states=(Request(2, 200.0 * MIB),),
        forward=(),
        first=(),
        next=(Request(3, 0.0, 40.0 * MIB / 1000), Request(3)),
        step=(),
    )
    found = filling_tokens(Case(), script, (300 + asked) * MIB)
    assert (found is not None) == reached
    assert found is None or 0.98 * asked <= found * 40 / 1000 <= asked

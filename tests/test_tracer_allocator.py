"""The model of the CUDA caching allocator, against its published rules."""

from __future__ import annotations

import pytest

from tracer.allocator import CachingAllocator, OutOfMemory, rounded

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512_bytes(asked: int, taken: int) -> None:
    """A request takes the next multiple of 512 bytes."""
    assert rounded(asked) == taken


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (100 * MIB + 1, 102 * MIB),
    ],
)
def test_first_request_reserves_a_segment_by_its_size(asked: int, reserved: int) -> None:
    """Small, middle and large requests get segments of 2 MiB, 20 MiB and their own size rounded to 2 MiB."""
    allocator = CachingAllocator()
    allocator.allocate(0, asked)
    assert allocator.reserved == reserved


def replay(*steps: tuple[int, int] | int) -> int:
    """Allocate (key, MiB) pairs, release bare keys, and return what is reserved in MiB."""
    allocator = CachingAllocator()
    for step in steps:
        if isinstance(step, int):
            allocator.release(step)
        else:
            allocator.allocate(step[0], step[1] * MIB)
    assert allocator.reserved == allocator.peak_reserved, "segments are never given back"
    return allocator.reserved // MIB


@pytest.mark.parametrize(
    ("steps", "reserved"),
    [
        ([(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)], 20),  # one middle segment, split five times
        ([(0, 50), 0, (1, 40)], 50),  # a free segment is used again
        ([(0, 50), 0, (1, 40), (2, 10)], 50),  # and so is what is left of it
        ([(0, 50), 0, (1, 60)], 110),  # too small: reserved on top
        ([(0, 60), 0, (1, 20), (2, 20), (3, 20), 1, 2, (4, 40)], 60),  # neighbours merge
        ([(0, 60), 0, (1, 20), (2, 20), (3, 20), 1, 3, (4, 40)], 100),  # a hole on either side does not
        ([(0, 60), (1, 50), 0, 1, (2, 45)], 110),  # best fit: out of the 50 ...
        ([(0, 60), (1, 50), 0, 1, (2, 45), (3, 60)], 110),  # ... so that the 60 is still whole
    ],
)
def test_free_blocks_are_split_merged_and_taken_by_best_fit(steps: list[tuple[int, int] | int], reserved: int) -> None:
    """Reserved memory follows from the order of requests."""
    assert replay(*steps) == reserved


def test_blocks_stay_with_their_stream() -> None:
    """A block that one stream frees does not serve another."""
    allocator = CachingAllocator()
    allocator.allocate(0, 50 * MIB, "gather")
    allocator.release(0)
    allocator.allocate(1, 50 * MIB)
    assert allocator.reserved == 100 * MIB
    allocator.allocate(2, 50 * MIB, "gather")
    assert allocator.reserved == 100 * MIB


def test_a_large_block_keeps_a_rest_that_is_not_worth_splitting() -> None:
    """Up to 1 MiB beyond a large request stays with it; a small block is split to the last 512 bytes."""
    allocator = CachingAllocator()
    allocator.allocate(0, 11 * MIB)
    allocator.allocate(1, 600 * KIB)
    assert allocator.reserved == 12 * MIB + 2 * MIB
    allocator.allocate(2, MIB)
    assert allocator.reserved == 12 * MIB + 2 * MIB


def play(allocator: CachingAllocator, *steps: tuple[int, int] | int | None) -> int:
    """Allocate (key, MiB) pairs, release bare keys, empty the cache on ``None``; return what is reserved in MiB."""
    for step in steps:
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, int):
            allocator.release(step)
        else:
            allocator.allocate(step[0], step[1] * MIB)
    return allocator.reserved // MIB


@pytest.mark.parametrize(
    ("limit", "steps", "reserved"),
    [
        (100, [(0, 60), 0, (1, 100)], 100),  # the free segment is given back for a larger one
        (100, [(0, 50), 0, (1, 20), 1, (2, 60)], 60),  # also one that was split, once it is whole again
        (100, [(0, 40), (1, 40), 0, (2, 60)], 100),  # what others use stays
        (100, [(0, 40), (1, 60), 0, 1, (2, 30), (3, 30), (4, 30)], 100),  # holes are used before anything is given back
    ],
)
def test_a_full_device_gets_free_segments_back(limit: int, steps: list[tuple[int, int] | int], reserved: int) -> None:
    """A request that finds no room frees every wholly free segment and is made once more."""
    assert play(CachingAllocator(limit * MIB), *steps) == reserved


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        (100, [(0, 60), (1, 41)]),  # more than there is
        (100, [(0, 60), 0, (1, 20), (2, 60)]),  # 80 are enough, but 40 of them are a hole behind the 20
    ],
)
def test_holes_in_used_segments_do_not_help_a_full_device(limit: int, steps: list[tuple[int, int] | int]) -> None:
    """Out of memory is what no wholly free segment can cure, however much is free in total."""
    with pytest.raises(OutOfMemory):
        play(CachingAllocator(limit * MIB), *steps)


@pytest.mark.parametrize(
    ("steps", "reserved"),
    [
        ([(0, 50)], 60),  # pages of 20 MiB
        ([(0, 50), (1, 50)], 100),  # the second one goes on where the first one ends
        ([(0, 50), 0, (1, 60), (2, 20)], 80),  # a free range grows instead of staying behind
        ([(0, 50), (1, 50), 0, (2, 60)], 160),  # a hole that is too small is passed over
        ([(0, 50), (1, 50), 0, None], 60),  # whole pages of a hole are given back: 0-40 of 0-50
        ([(0, 50), (1, 50), 0, None, (2, 30)], 100),  # and mapped again, at the lowest addresses
        ([(0, 50), (1, 50), 0, 1, None], 0),
    ],
)
def test_expandable_segments_grow_and_give_back_pages(steps: list[tuple[int, int] | int | None], reserved: int) -> None:
    """One range of addresses for a pool, backed by pages as far as it is used."""
    assert play(CachingAllocator(expandable=True), *steps) == reserved


def test_expandable_segments_cure_what_holes_do_to_ordinary_ones() -> None:
    """The request that fails above behind a hole succeeds: the pages of the hole are given back."""
    allocator = CachingAllocator(100 * MIB, expandable=True)
    assert play(allocator, (0, 60), 0, (1, 20), (2, 60)) == 80


def test_expandable_segments_can_be_switched_while_a_process_runs() -> None:
    """Blocks of before stay where they are; ordinary requests do not take free pieces of expandable segments."""
    allocator = CachingAllocator()
    assert play(allocator, (0, 40)) == 40
    allocator.expandable = True
    assert play(allocator, (1, 40), 0, (2, 30)) == 80  # the free ordinary segment serves
    allocator.expandable = False
    assert play(allocator, 1, (3, 40)) == 120
    assert play(allocator, None) == 80


def test_small_requests_get_small_pages() -> None:
    """The small pool of an expandable segment maps 2 MiB at a time."""
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(0, 600 * KIB)
    allocator.allocate(1, 11 * MIB)
    assert allocator.reserved == 2 * MIB + 20 * MIB

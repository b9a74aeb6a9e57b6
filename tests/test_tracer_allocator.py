"""The model of the CUDA caching allocator, against its published rules."""

from __future__ import annotations

import pytest

from tracer.allocator import CachingAllocator, rounded

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

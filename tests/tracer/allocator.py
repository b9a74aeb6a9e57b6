"""A model of PyTorch's CUDA caching allocator, in its default configuration.

Source: c10/cuda/CUDACachingAllocator.cpp. Requests are rounded up to 512 bytes; up to 1 MiB they come out of 2 MiB
segments, below 10 MiB out of 20 MiB segments, larger ones get a segment of their own, rounded to 2 MiB. Best fit by
(size, address) within the pool of one stream; a block is split when the rest is worth keeping; free neighbours merge.

Left out: segments given back under memory pressure, expandable segments, events of ``record_stream``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

ROUND = 512
SMALL_REQUEST = 1 << 20
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
OWN_SEGMENT = 10 << 20


def rounded(num_bytes: int) -> int:
    """Return the bytes that a request really takes."""
    return max(ROUND, -(-num_bytes // ROUND) * ROUND)


def _segment_bytes(size: int) -> int:
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


class Pool(NamedTuple):
    """Blocks never move between pools."""

    stream: str
    small: bool


@dataclass(slots=True, eq=False)
class Piece:
    """A contiguous part of one segment."""

    address: int
    size: int
    pool: Pool
    before: Piece | None = None
    after: Piece | None = None
    free: bool = True


class CachingAllocator:
    """Serves requests by key and remembers the most that was ever reserved."""

    def __init__(self) -> None:
        self.reserved = 0
        self.peak_reserved = 0
        self._free: dict[Pool, list[tuple[int, int, Piece]]] = {}
        self._used: dict[int, Piece] = {}
        self._next_address = 0

    def allocate(self, key: int, num_bytes: int, stream: str = "compute") -> None:
        """Serve ``num_bytes`` under ``key``."""
        size = rounded(num_bytes)
        pool = Pool(stream, size <= SMALL_REQUEST)
        piece = self._best_fit(pool, size) or self._new_segment(pool, size)
        rest = piece.size - size
        if rest >= ROUND if pool.small else rest > SMALL_REQUEST:
            self._split(piece, size)
        piece.free = False
        self._used[key] = piece

    def release(self, key: int) -> None:
        """Give back what ``key`` holds; it merges with free neighbours."""
        piece = self._used.pop(key)
        piece.free = True
        if piece.after is not None and piece.after.free:
            self._take(piece.after)
            self._absorb(piece, piece.after)
        if piece.before is not None and piece.before.free:
            self._take(piece.before)
            piece = self._absorb(piece.before, piece)
        self._offer(piece)

    def _offer(self, piece: Piece) -> None:
        insort(self._free.setdefault(piece.pool, []), (piece.size, piece.address, piece))

    def _take(self, piece: Piece) -> None:
        pieces = self._free[piece.pool]
        del pieces[bisect_left(pieces, (piece.size, piece.address))]

    def _best_fit(self, pool: Pool, size: int) -> Piece | None:
        pieces = self._free.get(pool, [])
        index = bisect_left(pieces, (size,))
        return pieces.pop(index)[2] if index < len(pieces) else None

    def _new_segment(self, pool: Pool, size: int) -> Piece:
        piece = Piece(self._next_address, _segment_bytes(size), pool)
        self._next_address += piece.size
        self.reserved += piece.size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return piece

    def _split(self, piece: Piece, size: int) -> None:
        rest = Piece(piece.address + size, piece.size - size, piece.pool, piece, piece.after)
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.size = rest, size
        self._offer(rest)

    @staticmethod
    def _absorb(left: Piece, right: Piece) -> Piece:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        return left

"""A model of PyTorch's CUDA caching allocator: rounding, pools, splitting, a limit, expandable segments.

Source: c10/cuda/CUDACachingAllocator.cpp (``malloc``, ``get_free_block``, ``alloc_block``, ``try_allocate_expandable_block``,
``release_cached_blocks``, ``unmap_block``; torch 2.6 to 2.13).

- Requests are rounded up to 512 bytes. Up to 1 MiB they come out of segments of 2 MiB, below 10 MiB out of segments of
  20 MiB, larger ones get a segment of their own, rounded to 2 MiB. Small and large requests, and streams, never share.
- Best fit by (size, address); a block is split when the rest is worth keeping; free neighbours merge.
- Where the device has no room for a new segment, every segment that is wholly free is given back, and the request is made
  once more. Only what is left then is an `OutOfMemory`: free bytes inside segments that are partly used do not help.
- Expandable segments: one range of addresses for each pool, backed by pages of 2 MiB (small) or 20 MiB (large) as far as
  it is used; a lack of room gives back every page that is wholly free.

Left out: ``max_split_size_mb``, ``garbage_collection_threshold`` and ``roundup_power2_divisions``, which are off unless somebody
sets them; private pools of CUDA graphs; the delay that ``record_stream`` puts on the reuse of a block (a failing request
waits for those events, so that it changes no verdict).
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
NO_LIMIT = 1 << 50
_ADDRESSES = 1 << 46
"""Addresses of one expandable segment: more than any device has bytes."""


class OutOfMemory(Exception):
    """A request that finds no room although everything that is wholly free has been given back."""


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

    @property
    def page(self) -> int:
        """Bytes that an expandable segment maps at once."""
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT


@dataclass(slots=True, eq=False)
class Piece:
    """A contiguous part of one segment."""

    address: int
    size: int
    pool: Pool
    before: Piece | None = None
    after: Piece | None = None
    free: bool = True
    expandable: bool = False
    mapped: bool = True

    @property
    def could_grow_to(self) -> int:
        """Bytes that a free piece of an expandable segment can have once what follows it is mapped."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


class CachingAllocator:
    """Serves requests by key below a limit, and remembers the most that was ever reserved."""

    def __init__(self, limit: int = NO_LIMIT, *, expandable: bool = False) -> None:
        self.limit = limit
        self.expandable = expandable
        """Whether new segments are expandable; may be switched at any time, as ``_set_allocator_settings`` does."""
        self.reserved = 0
        self.peak_reserved = 0
        self._free: dict[Pool, list[tuple[int, int, Piece]]] = {}
        self._unmapped: dict[Pool, list[tuple[int, Piece]]] = {}
        self._used: dict[int, Piece] = {}
        self._next_address = 0

    def allocate(self, key: int, num_bytes: int, stream: str = "compute") -> None:
        """Serve ``num_bytes`` under ``key``; raises `OutOfMemory`."""
        size = rounded(num_bytes)
        pool = Pool(stream, size <= SMALL_REQUEST)
        piece = self._best_fit(pool, size) or self._obtain(pool, size)
        rest = piece.size - size
        if rest >= ROUND if pool.small or self.expandable else rest > SMALL_REQUEST:
            self._split(piece, size)
        piece.free = False
        self._used[key] = piece

    def release(self, key: int) -> None:
        """Give back what ``key`` holds; it merges with free neighbours."""
        piece = self._used.pop(key)
        piece.free = True
        self._offer(self._merged(piece))

    def empty_cache(self) -> None:
        """Give back every segment, and every page of an expandable one, that is wholly free."""
        for pool in list(self._free):
            for _, _, piece in list(self._free[pool]):
                if piece.expandable:
                    self._unmap(piece)
                elif piece.before is None and piece.after is None:
                    self._take(piece)
                    self.reserved -= piece.size

    # -- free pieces ------------------------------------------------------------------------------------------------
    def _offer(self, piece: Piece) -> None:
        insort(self._free.setdefault(piece.pool, []), (piece.size, piece.address, piece))

    def _take(self, piece: Piece) -> None:
        pieces = self._free[piece.pool]
        del pieces[bisect_left(pieces, (piece.size, piece.address))]

    def _best_fit(self, pool: Pool, size: int) -> Piece | None:
        pieces = self._free.get(pool, [])
        index = bisect_left(pieces, (size,))
        if index < len(pieces) and pieces[index][2].expandable:
            index = self._tightest(pieces, index) if self.expandable else self._ordinary(pieces, index)
        return pieces.pop(index)[2] if index < len(pieces) else None

    @staticmethod
    def _tightest(pieces: list[tuple[int, int, Piece]], index: int) -> int:
        """The piece at the end of an expandable segment counts with what it could grow to."""
        while index + 1 < len(pieces):
            here, following = pieces[index][2], pieces[index + 1][2]
            if not here.expandable or following.could_grow_to >= here.could_grow_to:
                break
            index += 1
        return index

    @staticmethod
    def _ordinary(pieces: list[tuple[int, int, Piece]], index: int) -> int:
        while index < len(pieces) and pieces[index][2].expandable:
            index += 1
        return index

    # -- new memory -------------------------------------------------------------------------------------------------
    def _obtain(self, pool: Pool, size: int) -> Piece:
        make = self._grow if self.expandable else self._new_segment
        piece = make(pool, size)
        if piece is None:
            self.empty_cache()
            piece = make(pool, size)
        if piece is None:
            raise OutOfMemory(f"{size} bytes above {self.reserved} reserved of {self.limit}")
        return piece

    def _reserve(self, num_bytes: int) -> bool:
        if self.reserved + num_bytes > self.limit:
            return False
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _new_segment(self, pool: Pool, size: int) -> Piece | None:
        size = _segment_bytes(size)
        if not self._reserve(size):
            return None
        return Piece(self._addresses(size), size, pool)

    def _addresses(self, size: int) -> int:
        self._next_address += size
        return self._next_address - size

    def _split(self, piece: Piece, size: int) -> None:
        self._offer(self._cut(piece, size))

    @staticmethod
    def _cut(piece: Piece, size: int) -> Piece:
        """Shorten a piece and return the rest, which is in no list yet."""
        rest = Piece(piece.address + size, piece.size - size, piece.pool, piece, piece.after)
        rest.expandable, rest.mapped = piece.expandable, piece.mapped
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.size = rest, size
        return rest

    def _merged(self, piece: Piece) -> Piece:
        """Join a mapped piece, which is in no list, with the free neighbours of its segment."""
        if piece.after is not None and piece.after.free and piece.after.mapped:
            self._take(piece.after)
            self._absorb(piece, piece.after)
        if piece.before is not None and piece.before.free and piece.before.mapped:
            self._take(piece.before)
            piece = self._absorb(piece.before, piece)
        return piece

    @staticmethod
    def _absorb(left: Piece, right: Piece) -> Piece:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        return left

    # -- expandable segments ----------------------------------------------------------------------------------------
    def _grow(self, pool: Pool, size: int) -> Piece | None:
        """Map as many pages as ``size`` needs, at the lowest addresses where it fits."""
        piece = self._growable(pool, size)
        if not piece.mapped:
            mapped = self._map(piece, size)
            if mapped is None:
                return None
            piece = mapped
        while piece.size < size:
            assert piece.after is not None  # _growable found enough free addresses in a row
            mapped = self._map(piece.after, size - piece.size)
            if mapped is None:
                return None
            piece = mapped
        self._take(piece)
        return piece

    def _growable(self, pool: Pool, size: int) -> Piece:
        for _, piece in self._unmapped.setdefault(pool, []):
            start = piece.before if piece.before is not None and piece.before.free else piece
            if self._room(start) >= size:
                return start
        segment = Piece(self._addresses(_ADDRESSES), _ADDRESSES, pool, expandable=True, mapped=False)
        self._unmapped[pool].append((segment.address, segment))
        return segment

    @staticmethod
    def _room(piece: Piece | None) -> int:
        room = 0
        while piece is not None and piece.free:
            room += piece.size
            piece = piece.after
        return room

    def _map(self, piece: Piece, size: int) -> Piece | None:
        """Back the beginning of an unmapped piece with pages; returns the free piece that it is part of then."""
        page = piece.pool.page
        size = min(-(-min(size, piece.size) // page) * page, piece.size)
        if not self._reserve(size):
            return None
        unmapped = self._unmapped[piece.pool]
        del unmapped[bisect_left(unmapped, (piece.address,))]
        if size < piece.size:
            rest = self._cut(piece, size)
            insort(unmapped, (rest.address, rest), key=lambda entry: entry[0])
        piece.mapped = True
        piece = self._merged(piece)
        self._offer(piece)
        return piece

    def _unmap(self, piece: Piece) -> None:
        """Give back the whole pages inside a free piece."""
        page = piece.pool.page
        start, end = -(-piece.address // page) * page, (piece.address + piece.size) // page * page
        if end <= start:
            return
        self._take(piece)
        if end < piece.address + piece.size:
            self._offer(self._cut(piece, end - piece.address))
        if start > piece.address:
            left, piece = piece, self._cut(piece, start - piece.address)
            self._offer(left)
        piece.mapped = False
        self.reserved -= piece.size
        self._note_unmapped(piece)

    def _note_unmapped(self, piece: Piece) -> None:
        unmapped = self._unmapped[piece.pool]
        for left, right in ((piece, piece.after), (piece.before, piece)):
            if left is not None and right is not None and not left.mapped and not right.mapped:
                other = right if left is piece else left
                del unmapped[bisect_left(unmapped, (other.address,))]
                piece = self._absorb(left, right)
        insort(unmapped, (piece.address, piece), key=lambda entry: entry[0])

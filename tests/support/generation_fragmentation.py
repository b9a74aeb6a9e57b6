"""How much more than its tensors a growing cache needs on a full GPU.

    PYTHONPATH=tests python -m support.generation_fragmentation

The blocks of a prefill and of every decode step of ``generate`` go through a model of torch's caching allocator that has a
limit: out of segments it gives back what is wholly free, as CUDA's does, and only then fails.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from tracer.allocator import NO_LIMIT, CachingAllocator, OutOfMemory

BF16, FP32 = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """One call of generate: sizes of what it allocates."""

    rows: int
    prompt: int
    new: int
    layers: int
    kv: int
    vocabulary: int
    hidden: int
    mlp: int


class FullGpu(CachingAllocator):
    """The allocator below a limit; counts what is asked for."""

    def __init__(self, limit: int, *, expandable: bool = False) -> None:
        super().__init__(limit, expandable=expandable)
        self.used = self.peak_used = self.key = 0
        self.sizes: dict[int, int] = {}

    def new(self, num_bytes: int) -> int:
        """Serve a request and return its key."""
        self.key += 1
        self.allocate(self.key, num_bytes)
        self.sizes[self.key] = num_bytes
        self.used += num_bytes
        self.peak_used = max(self.peak_used, self.used)
        return self.key

    def drop(self, *keys: int) -> None:
        """Give back what the keys hold."""
        for key in keys:
            self.release(key)
            self.used -= self.sizes.pop(key)


def replay(loop: Loop, limit: int = NO_LIMIT, before: Loop | None = None, *, expandable: bool = False) -> int:
    """Return the largest sum of live bytes of one call; raises `OutOfMemory`. ``before`` ran in the same process."""
    gpu = FullGpu(limit, expandable=expandable)
    for call in (before, loop) if before else (loop,):
        cache = _prefill(gpu, call)
        held: list[int] = []
        for step in range(1, call.new):
            for place, old in enumerate(cache):
                cache[place] = gpu.new(call.rows * call.kv * BF16 * (call.prompt + step))
                gpu.drop(old)
            held = _choose(gpu, call, held)
        gpu.drop(*cache, *held)
    return gpu.peak_used


def _prefill(gpu: FullGpu, call: Loop) -> list[int]:
    tokens = call.rows * call.prompt
    residual, cache = gpu.new(BF16 * call.hidden * tokens), []
    for _ in range(call.layers):
        mlp = [gpu.new(BF16 * call.mlp * tokens) for _ in range(3)]
        cache += [gpu.new(BF16 * call.kv * tokens) for _ in range(2)]
        gpu.drop(*mlp)
    gpu.drop(residual)
    return cache


def _choose(gpu: FullGpu, call: Loop, held: list[int]) -> list[int]:
    cells = call.rows * call.vocabulary
    logits = gpu.new(BF16 * cells)
    kept = [gpu.new(FP32 * cells) for _ in range(3)]
    gpu.drop(*held)
    gpu.drop(gpu.new(FP32 * cells), logits)
    return kept


def needed_share(loop: Loop, before: Loop | None = None, *, expandable: bool = False) -> float:
    """Return the smallest limit that works, as a multiple of the live bytes, to 1 %."""
    live, low, high = replay(loop), 1.0, 2.0
    while high - low > 0.01:
        middle = (low + high) / 2
        try:
            replay(loop, int(live * middle), before, expandable=expandable)
            high = middle
        except OutOfMemory:
            low = middle
    return high


LOOPS = [
    Loop(rows=15, prompt=200, new=120, layers=28, kv=256, vocabulary=151936, hidden=1536, mlp=8960),
    Loop(rows=4, prompt=200, new=500, layers=28, kv=256, vocabulary=151936, hidden=1536, mlp=8960),
    Loop(rows=64, prompt=64, new=500, layers=28, kv=256, vocabulary=151936, hidden=1536, mlp=8960),
    Loop(rows=8, prompt=512, new=300, layers=36, kv=1024, vocabulary=151936, hidden=2560, mlp=9728),
    Loop(rows=32, prompt=128, new=400, layers=32, kv=1024, vocabulary=128256, hidden=4096, mlp=14336),
    Loop(rows=1, prompt=512, new=600, layers=28, kv=512, vocabulary=152064, hidden=3584, mlp=18944),
    Loop(rows=16, prompt=100, new=300, layers=30, kv=192, vocabulary=49152, hidden=576, mlp=1536),
]


def main() -> None:
    """Print what each loop needs, in a fresh process and after a shorter one, with ordinary and expandable segments."""
    for expandable in (False, True):
        shares = []
        for loop in LOOPS:
            shorter = replace(loop, rows=max(1, loop.rows // 2), prompt=loop.prompt // 2 + 3)
            found = [needed_share(loop, before, expandable=expandable) for before in (None, shorter)]
            shares += found
            print(f"{loop} fresh {found[0]:.2f} after another {found[1]:.2f}", flush=True)
        spread = (
            f"median {statistics.median(shares):.2f}, least {min(shares):.2f}, most {max(shares):.2f} of {len(shares)}"
        )
        most = sorted(shares)[-3]
        print(f"{'expandable' if expandable else 'ordinary'} segments: {spread}; all but two within {most:.2f}")


if __name__ == "__main__":
    main()

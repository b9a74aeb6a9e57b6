"""Which accelerator was it? The capacity that a message names, looked up in conf/hardware."""

from __future__ import annotations

from hydra_plugins.memfit.diagnosis.amount import Amount
from hydra_plugins.memfit.hardware import catalog

_NEAR = 0.002
"""Share of the capacity by which one driver differs from another."""


def by_capacity(capacity: Amount) -> tuple[str, ...]:
    """Return the names of the products whose processes print this capacity; the nearest first.

    A message shows two decimals, drivers differ by some hundred MiB, and several products share a size. Where nobody has
    seen just this capacity before, the nearest product counts, if it is near.
    """
    away = {name: _away(name, capacity) for name in catalog.names()}
    known = [name for name, (outside, _) in away.items() if outside <= capacity.slack_bytes]
    near = [name for name, (outside, _) in away.items() if outside <= _NEAR * capacity.num_bytes]
    nearest = [min(near, key=lambda name: away[name])] if near else []
    return tuple(sorted(known, key=lambda name: (away[name][1], name))) or tuple(nearest)


def _away(name: str, capacity: Amount) -> tuple[int, int]:
    """Return how far a capacity is from the range that was seen of a product, and from the range's lower end."""
    low, high = catalog.facts(name).capacity_range_bytes
    return max(0, low - capacity.num_bytes, capacity.num_bytes - high), abs(low - capacity.num_bytes)


def exact_capacity(name: str, capacity: Amount) -> int | None:
    """Return the capacity to plan with where the message names another one than the file; else ``None``."""
    own = int(catalog.node(name)["capacity_bytes"])
    if abs(own - capacity.num_bytes) <= capacity.slack_bytes:
        return None
    return capacity.num_bytes - capacity.slack_bytes

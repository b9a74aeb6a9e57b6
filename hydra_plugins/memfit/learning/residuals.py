"""From observed residuals to a margin: the rule, its statistics, and what it can get wrong.

A residual is ``x = ln(observed / predicted)`` of one run: 0 where the formulas are right. The next run of the same kind
stays within its budget when the margin ``m`` satisfies ``ln(1 / (1 - m)) >= x``. The rule takes the upper prediction
bound of a normal sample whose variance has a prior:

    s^2    = (4 s0^2 + sum (x - mean)^2) / (4 + n - 1)
    above  = t(0.99; 4 + n - 1) s sqrt(1 + 1/n)
    bound  = max(mean + above, min(above, ln(1 / (1 - default))), max(x))
    m      = 1 - exp(-bound)

The middle term is for runs below the prediction: they may have had shorter data, and do not pull the centre below 0.
``s0`` is chosen such that one run at x = 0 gives exactly the default margin: one run moves the centre, and the default margin
stays around it; every further run replaces a part of it by the spread that was seen. Fewer than `MIN_RUNS` runs can only
raise the margin, and it never falls below `FLOOR`.

If residuals of a kind are independent and normal, a later run exceeds the bound in about 1 % of the cases (docs/learning.md has
the simulation, other distributions too). Whatever their distribution, an exchangeable run exceeds the largest of n in
at most 1 of n + 1 cases: that is all that is certain. A change of the data, of libraries or of the driver is no
exchangeable run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_RUNS = 3
"""Runs below which the margin is not lowered."""
FLOOR = 0.02
"""Smallest learned margin: a peak is read between steps or once in a second, and a reading can miss it by about this."""
CEILING = 0.5
"""Largest learned margin: beyond it the plan and the reading do not belong together."""
_PRIOR_RUNS = 4
_T99 = {
    4: 3.747, 5: 3.365, 6: 3.143, 7: 2.998, 8: 2.896, 9: 2.821, 10: 2.764, 12: 2.681, 15: 2.602, 20: 2.528, 30: 2.457,
    60: 2.390, 120: 2.358,
}  # fmt: skip
"""Student's t, one-sided 99 %, by degrees of freedom; the next lower entry counts. Source: any table of the distribution."""


def margin_of(ratios: Sequence[float], default: float) -> float:
    """Return the margin after runs with these ratios of observed to predicted bytes; ``default`` without any."""
    if not ratios:
        return default
    bound = _bound([math.log(ratio) for ratio in ratios], default)
    learned = min(max(1 - math.exp(-bound), FLOOR), CEILING)
    return _up(learned if len(ratios) >= MIN_RUNS else max(learned, default))


def limit_of(*, predicted: int, needed: int, capacity: int, now: int) -> int:
    """Return the largest prediction that is allowed on a device of ``now`` bytes after a run died. Bytes.

    It was ``predicted``, and needed at least ``needed``, which was more than the ``capacity`` that it had. The formulas'
    error is taken to be proportional; one percent below that the same plan is not made again.
    """
    return int(now * predicted / max(needed, capacity) * 0.99)


def _bound(x: Sequence[float], default: float) -> float:
    n, mean = len(x), sum(x) / len(x)
    freedom = _PRIOR_RUNS + n - 1
    spread = math.sqrt((_PRIOR_RUNS * _prior_spread(default) ** 2 + sum((v - mean) ** 2 for v in x)) / freedom)
    above = _t99(freedom) * spread * math.sqrt(1 + 1 / n)
    return max(mean + above, min(above, -math.log(1 - default)), *x)


def _prior_spread(default: float) -> float:
    return -math.log(1 - default) / (_T99[_PRIOR_RUNS] * math.sqrt(2))


def _t99(freedom: int) -> float:
    return _T99[max(known for known in _T99 if known <= freedom)]


def _up(margin: float) -> float:
    """A margin is shown with three digits, and rounded up to them."""
    return math.ceil(round(margin * 1000, 6)) / 1000

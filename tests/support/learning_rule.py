"""How often a later run needs more than the learned margin keeps free, by simulation.

python -m support.learning_rule                   prints the table (with ``tests`` on the path)
python -m support.learning_rule --write           puts it between the markers of docs/learning.md
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

from hydra_plugins.memfit.learning.residuals import margin_of
from hydra_plugins.memfit.memory.allocator import DEFAULT_MARGIN, EXPANDABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learning.md"
BEGIN, END = "<!-- rule: begin -->", "<!-- rule: end -->"
RUNS = (1, 3, 10, 30)
TRIALS = 1000
Draw = Callable[[random.Random], float]


def _student(generator: random.Random) -> float:
    return generator.gauss(0, 1) / math.sqrt(sum(generator.gauss(0, 1) ** 2 for _ in range(3)) / 3)


RESIDUALS: dict[str, Draw] = {
    "normal, formulas right, spread 0.5 %": lambda g: g.gauss(0, 0.005),
    "normal, formulas right, spread 2 %": lambda g: g.gauss(0, 0.02),
    "normal, formulas 3 % low, spread 2 %": lambda g: g.gauss(0.03, 0.02),
    "normal, formulas 10 % high, spread 5 %": lambda g: g.gauss(-0.1, 0.05),
    "heavy tails (Student, 3 degrees), scale 1 %": lambda g: 0.01 * _student(g),
    "skewed upwards (exponential), mean 2 %": lambda g: g.expovariate(50),
    "one run in twenty 15 % higher, spread 1 %": lambda g: g.gauss(0.15 if g.random() < 0.05 else 0, 0.01),
}


def simulate(draw: Draw, num_runs: int, trials: int = TRIALS) -> tuple[float, float]:
    """Return the share of later runs above the margin learned from ``num_runs`` runs, and that margin's median."""
    generator = random.Random(20261121 + num_runs)
    default, above, margins = DEFAULT_MARGIN[EXPANDABLE], 0, []
    for _ in range(trials):
        margin = margin_of([math.exp(draw(generator)) for _ in range(num_runs)], default)
        margins.append(margin)
        above += draw(generator) > -math.log(1 - margin)
    return above / trials, sorted(margins)[trials // 2]


def markdown() -> str:
    """Return the table: runs above the margin, and the margin."""
    head = ["| residuals |" + "".join(f" {n} run{'s' * (n > 1)} |" for n in RUNS), "|---|" + "---|" * len(RUNS)]
    rows = []
    for name, draw in RESIDUALS.items():
        cells = (simulate(draw, n) for n in RUNS)
        rows.append(f"| {name} |" + "".join(f" {above:.1%} of {margin:.3f} |" for above, margin in cells))
    return "\n".join((*head, *rows))


def replaced(text: str) -> str:
    """Return the page with the table of today."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())

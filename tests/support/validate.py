"""Everything that memfit's accuracy is claimed by, in one command: ``python -m support.validate`` (``make validate``).

Run from the top of the repository with ``PYTHONPATH=tests:.``. It computes every page of docs/validation that stands for
predictions, compares it with the one in the repository, and holds the figures against their bounds. ``--write`` writes the pages
instead. Each page has a module of its own that knows its data; here is only which pages and which bounds there are.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from hydra_plugins.memfit.memory import xla_training
from hydra_plugins.memfit.memory.allocator import CAUTIOUS_MARGIN, DEFAULT_MARGIN, EXPANDABLE, ORDINARY
from support import (
    areal_validation,
    case_validation,
    estimates,
    generation_validation,
    megatron_validation,
    peers_validation,
    published_validation,
    reserved_validation,
    tpu_survey,
    trainer_validation,
)

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page, or the part of one between ``<!-- marker -->`` and ``<!-- /marker -->``, that is computed from data."""

    path: str
    text: Callable[[], str]
    marker: str = ""

    def current(self) -> str:
        """Return what the repository holds."""
        whole = (ROOT / self.path).read_text(encoding="utf-8")
        if not self.marker:
            return whole
        found = self._part.search(whole)
        assert found, f"{self.path} lacks the marks <!-- {self.marker} --> and <!-- /{self.marker} -->"
        return found[1]

    def write(self) -> None:
        """Put what the data give into the repository."""
        path, text = ROOT / self.path, self.text()
        if self.marker:
            marked = f"<!-- {self.marker} -->\n{text}<!-- /{self.marker} -->"
            text = self._part.sub(lambda _: marked, path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")

    @property
    def _part(self) -> re.Pattern[str]:
        return re.compile(rf"<!-- {self.marker} -->\n(.*?)<!-- /{self.marker} -->", re.DOTALL)


PAGES = (
    Page(path="docs/validation/trainer.md", text=trainer_validation.table),
    Page(path="docs/memory-model.md", marker="error-bars", text=trainer_validation.error_bars),
    Page(path="docs/validation/megatron.md", text=megatron_validation.page),
    Page(path="docs/validation/cases.md", text=case_validation.page),
    Page(path="docs/validation/areal.md", text=areal_validation.page),
    Page(path="docs/validation/reserved.md", text=reserved_validation.page),
    Page(path="docs/validation/peers.md", text=peers_validation.page),
    Page(path="docs/validation/published.md", text=published_validation.page),
    Page(path="docs/tpu.md", marker="survey", text=tpu_survey.table),
    Page(path="docs/generation.md", marker="traces", text=generation_validation.table),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One claim: a number that is computed from data, and the bound that it may not pass."""

    claim: str
    value: float
    bound: float
    unit: str = "%"

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound

    def __str__(self) -> str:
        value, bound = (f"{n:.2%}" if self.unit == "%" else f"{n:.0f} {self.unit}" for n in (self.value, self.bound))
        return f"{'ok    ' if self.holds else 'FAILED'} {self.claim}: {value} (at most {bound})"


def figures() -> Iterator[Figure]:
    """Yield every claim."""
    yield from _trainer()
    yield from _megatron()
    yield from _reserved()
    yield from _generation()
    yield from _published()
    yield from _tpu()
    yield from _known_runs()


def _trainer() -> Iterator[Figure]:
    for split in ("fit", "held_out"):
        found = trainer_validation.summary(list(trainer_validation.comparisons(split)))
        name = f"trainer phases against op-level traces, {split}"
        yield Figure(claim=f"{name}: median error", value=found["median"], bound=0.01)
        yield Figure(claim=f"{name}: 95th percentile", value=found["p95"], bound=0.04)
        yield Figure(claim=f"{name}: furthest below", value=-found["lowest"], bound=0.02)


def _megatron() -> Iterator[Figure]:
    found = megatron_validation.summary(list(megatron_validation.comparisons()))
    yield Figure(claim="Megatron stages against op-level traces: median error", value=found["median"], bound=0.01)
    yield Figure(claim="Megatron stages against op-level traces: 95th percentile", value=found["p95"], bound=0.04)
    yield Figure(claim="Megatron stages against op-level traces: furthest below", value=-found["lowest"], bound=0.02)
    states = [abs(predicted / real - 1) for _, real, predicted, _, _ in megatron_validation.measured()]
    yield Figure(claim="Megatron states against mbridge's measurements: worst", value=max(states), bound=0.02)
    passes = [abs(predicted / real - 1) for _, _, _, real, predicted in megatron_validation.measured()]
    yield Figure(claim="Megatron activations against mbridge's measurements: worst", value=max(passes), bound=0.1)


def _reserved() -> Iterator[Figure]:
    for expandable, quantile, bound in (
        (True, 0.99, DEFAULT_MARGIN[EXPANDABLE]),
        (False, 0.75, DEFAULT_MARGIN[ORDINARY]),
        (False, 0.95, CAUTIOUS_MARGIN),
    ):
        needed = reserved_validation.quantile(reserved_validation.margins(expandable=expandable), quantile)
        kind = reserved_validation.SEGMENTS[expandable]
        yield Figure(claim=f"replayed steps, {kind}, 80 GB: margin that {quantile:.0%} need", value=needed, bound=bound)


def _generation() -> Iterator[Figure]:
    for split in ("fit", "held_out"):
        rows = [row for row in generation_validation.traces() if row["split"] == split]
        errors = [abs(generation_validation.error(row, without_weights=True)) for row in rows]
        claim = f"generation against traces, weights left out, {split}: median error"
        yield Figure(claim=claim, value=median(errors), bound=0.01)


def _published() -> Iterator[Figure]:
    bounds = {"generation": (0.01, 0.03), "weights": (0.01, 0.02), "kv": (0.01, 0.02)}
    bounds |= {"workspace": (0.02, 0.02), "pool": (0.01, 0.03), "training": (0.02, 0.07)}
    for kind, (middle, worst) in bounds.items():
        errors = [abs(error) for error in published_validation.errors(kind, complete=True)]
        claim = f"published measurements on GPUs, {kind}"
        yield Figure(claim=f"{claim}: median error", value=median(errors), bound=middle)
        yield Figure(claim=f"{claim}: worst", value=max(errors), bound=worst)


def _tpu() -> Iterator[Figure]:
    rows = [
        row for row in tpu_survey.rows() if row["split"] == "check" and row.get("kind", "train_step") == "train_step"
    ]
    errors = [abs(xla_training.train_step(tpu_survey.step(r)).total_bytes / r["natural_bytes"] - 1) for r in rows]
    yield Figure(claim="TPU steps against the XLA compiler: median error", value=median(errors), bound=0.05)


def _known_runs() -> Iterator[Figure]:
    judged = [j for j in map(case_validation.judge, case_validation.cases()) if j.complete and j.plan]
    verl = Counter((j.case["outcome"], j.verdict) for j in judged if not j.case["megatron"])
    megatron = Counter((j.case["outcome"], j.verdict) for j in judged if j.case["megatron"])
    areal = Counter(
        (case["outcome"], areal_validation.verdict(answer)) for case, answer, _ in areal_validation.judged()
    )
    yield from _outcomes("verl", verl)
    yield from _outcomes("verl Megatron", megatron)
    yield from _outcomes("AReaL", areal)


def _outcomes(name: str, counts: Counter[tuple[str, str]]) -> Iterator[Figure]:
    fits, claim = counts["fits", "fits"] + counts["fits", "oom"], f"public {name} runs"
    yield Figure(claim=f"{claim} that died, called fits", value=counts["oom", "fits"], bound=0, unit="runs")
    yield Figure(claim=f"{claim} that fitted, called oom", value=counts["fits", "oom"] / fits, bound=0.1)


def main(*, write: bool) -> int:
    """Write the pages, or compare them; print the figures; return the number of failures."""
    failures = 0
    for page in PAGES:
        if write:
            page.write()
        elif page.current() != page.text():
            failures += 1
            print(f"FAILED {page.path} is not what its data give; python -m support.validate --write")
    for figure in figures():
        failures += not figure.holds
        print(figure)
    for step in peers_validation.stale():
        failures += 1
        print(f"FAILED tests/data/peers.json: memfit predicts another peak for {step}; python -m support.peers memfit")
    if estimates.stored()["now"] != estimates.predict():
        failures += 1
        print("FAILED tests/data/estimates.json is not what memfit predicts today; python -m support.estimates")
    return failures


if __name__ == "__main__":
    raise SystemExit(main(write="--write" in sys.argv[1:]))

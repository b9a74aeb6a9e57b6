"""What training needs above what its tensors take, and what the default margin covers: docs/validation/reserved.md.

``python -m support.validate --write`` writes the page, from tests/data/reserved.json (``python -m tracer.make_reserved``: steps
replayed through a model of torch's allocator), tests/data/traces.json (errors of the formulas) and tests/data/overheads.yaml
(public observations of what lies outside the allocator).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.overheads import SERVED_TRAINER_BYTES, fragmentation_bytes, trainer_context_bytes
from support.trainer_validation import FORWARD, comparisons, predict, role_of
from tracer.case import Case

DATA = Path(__file__).parents[1] / "data"
MARGIN = Settings().margin
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
CAPACITIES = {"80 GB": 79 * GIB, "24 GB": 23 * GIB}
"""Usable bytes of two devices, for what is in bytes and not a share."""


@dataclass(frozen=True)
class Replay:
    """One process of steps, and the smallest limit that it survived."""

    row: dict[str, Any]
    transient_bytes: int
    """What the update allocates and frees, by memfit's formula."""
    planned_bytes: int
    """What memfit plans for: the largest phase with its term ``fragmentation``; no context, no margin."""

    @property
    def expandable(self) -> bool:
        """Whether segments were expandable."""
        return bool(self.row["expandable"])

    @property
    def above_live(self) -> float:
        """The limit over what was live at the peak, minus one."""
        return float(self.row["needed_bytes"] / self.row["live_bytes"] - 1)

    @property
    def share(self) -> float:
        """What was needed above the live peak, as a share of the transient bytes."""
        return float((self.row["needed_bytes"] - self.row["live_bytes"]) / self.transient_bytes)

    @property
    def margin(self) -> float:
        """The share of the limit that has to be kept free for the plan to be as large as what was needed."""
        return 1 - self.planned_bytes / float(self.row["needed_bytes"])


@cache
def replays() -> tuple[Replay, ...]:
    """Return every stored replay beside what memfit plans for it."""
    stored = json.loads((DATA / "reserved.json").read_text(encoding="utf-8"))["rows"]
    return tuple(_replay(row) for row in stored)


def _replay(row: dict[str, Any]) -> Replay:
    case = asdict(Case(**row["case"]))
    role, predicted, expandable = role_of(case), predict(case), row["expandable"]
    update, forward = role.update_pass().total_bytes, role.forward_pass().total_bytes
    planned = max(
        predicted[FORWARD[case["role"]]] + fragmentation_bytes(forward, expandable_segments=expandable),
        predicted["update"] + fragmentation_bytes(update, expandable_segments=expandable),
        predicted["optimizer_step"],
    )
    return Replay(row, update, planned)


@cache
def observations() -> dict[str, list[dict[str, Any]]]:
    """Return the public observations, by kind."""
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load((DATA / "overheads.yaml").read_text(encoding="utf-8"))
    return found


def context_errors() -> list[int]:
    """Return observed less assumed bytes outside the allocator, of each process that somebody posted."""
    return [int(o["gib"] * GIB) - _assumed(o) for o in observations()["context"]]


def _assumed(observation: dict[str, Any]) -> int:
    if "sends" in observation["what"]:
        return SERVED_TRAINER_BYTES
    return trainer_context_bytes(world_size=observation["gpus"] or 2)


def quantile(values: Iterable[float], q: float) -> float:
    """Return the smallest value that a share ``q`` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


@cache
def margins(*, expandable: bool, device: str = "80 GB") -> tuple[float, ...]:
    """
    Return the margin that every combination of three independent errors needs, as shares of the device.

    The allocator's (a replay), the formulas' (a traced phase, where it was predicted too low it needs room), and that of what
    lies outside the allocator (a posted process).
    """
    allocator = [r.margin for r in replays() if r.expandable == expandable]
    formulas = [-c.error for c in comparisons()]
    outside = [error / CAPACITIES[device] for error in context_errors()]
    return tuple(sorted(sum(errors) for errors in itertools.product(allocator, formulas, outside)))


def covered(*, expandable: bool, device: str = "80 GB") -> float:
    """Return the share of those combinations that the default margin is enough for."""
    needed = margins(expandable=expandable, device=device)
    return sum(value <= MARGIN for value in needed) / len(needed)


# -- the page -------------------------------------------------------------------------------------------------------
def page() -> str:
    """Return docs/validation/reserved.md."""
    return "\n".join([*_introduction(), *_replayed(), *_margin(), *_outside(), *_worst()]) + "\n"


def _introduction() -> Iterator[str]:
    versions = ", ".join(f"{name} {found}" for name, found in replays()[0].row["versions"].items())
    cases = len({json.dumps(r.row["case"]) for r in replays()})
    yield from (
        "# Reserved, not only allocated",
        "",
        "Written by `python -m support.validate --write`. People run out of memory on what torch's allocator has "
        "*reserved*: blocks are "
        "rounded, and free bytes inside a segment that is partly used serve nobody who needs more. "
        f"`python -m tracer.make_reserved` replayed {cases} traced cases, one of each kind ({versions}; "
        f"{replays()[0].row['date']}, "
        "CPU, no GPU), through a model of that allocator below a limit, as on a full device: when a segment cannot "
        "be had, everything that is "
        "wholly free is given back, and only then the request fails ([the rules](tracer.md)). The result is the "
        "smallest limit "
        "(to 0.4 %) that two steps survived.",
        "",
        "A step is four micro-batches of log-probs and four of the update, one of them full, then the optimizer step "
        "and `empty_cache`, where "
        "verl has it. Lengths: *dynamic* packs of a token budget, *static* rows of log-normal responses, or *padded* "
        "rows. States stay on the "
        "GPU, or are offloaded between passes. Adam's states are made by the first step among what is cached then. "
        "*Expandable*: as verl "
        "0.6 and later run their trainer, what is loaded first in ordinary segments, the rest in expandable ones.",
        "",
    )


def _heads() -> str:
    return " | ".join(f"p{q * 100:.0f}" for q in QUANTILES)


def _replayed() -> Iterator[str]:
    yield from ("## What replayed steps needed", "")
    yield f"| segments | replays | what | least | {_heads()} | most |"
    yield "|---|---|---|---" + "|---" * len(QUANTILES) + "|---|"
    for expandable, name in ((True, "expandable"), (False, "ordinary")):
        chosen = [r for r in replays() if r.expandable == expandable]
        for what, values in (
            ("above what is live at the peak", [r.above_live for r in chosen]),
            ("the same, of what an update allocates and frees", [r.share for r in chosen]),
            ("margin needed beside the planned term", [r.margin for r in chosen]),
        ):
            figures = " | ".join(f"{100 * quantile(values, q):.1f} %" for q in QUANTILES)
            yield f"| {name} | {len(chosen)} | {what} | {100 * min(values):.1f} % | {figures} | {100 * max(values):.1f} % |"
    terms = [fragmentation_bytes(1000, expandable_segments=e) / 10 for e in (True, False)]
    yield from (
        "",
        f"The planned term (`fragmentation`) is {terms[0]:g} % of what a pass allocates and frees with expandable "
        f"segments and "
        f"{terms[1]:g} % without (`memory/overheads.py`): above the replays' median with them, below it without, "
        f"where the margin has to make "
        "up for it. A public pair brackets the truth for ordinary segments: Qwen2-14B with LoRA on two 80 GB GPUs "
        "(verl 0.4.1) ran with 58 "
        "sequences a GPU and died with 59; with this term and the default margin the verdict changes there too "
        "([cases.md](cases.md)).",
        "",
    )


def _margin() -> Iterator[str]:
    yield from (
        f"## The default margin: {MARGIN:.0%}",
        "",
        "`memfit.margin` is there for what no term predicts: the allocator beyond its term (the replays), the "
        "formulas (every traced phase of "
        "[trainer.md](trainer.md), too low by so much) and what lies outside the allocator (the posted processes "
        "below). Every "
        "combination of one of each, taken to be independent:",
        "",
        "| segments | device | combinations | "
        + " | ".join(f"p{q * 100:.0f}" for q in QUANTILES)
        + f" | enough for {MARGIN:.0%} |",
        "|---|---|---" + "|---" * len(QUANTILES) + "|---|",
    )
    for (expandable, name), device in itertools.product(((True, "expandable"), (False, "ordinary")), CAPACITIES):
        needed = margins(expandable=expandable, device=device)
        figures = " | ".join(f"{100 * quantile(needed, q):.1f} %" for q in QUANTILES)
        enough = covered(expandable=expandable, device=device)
        yield f"| {name} | {device} | {len(needed)} | {figures} | {enough:.1%} |"
    ninety = math.ceil(100 * quantile(margins(expandable=False), 0.9)) / 100
    yield from (
        "",
        f"So {MARGIN:.0%} is more than the 99 % quantile on a device of 80 GB where segments are expandable, as in "
        f"the trainer of verl 0.6 and "
        "later. **verl 0.4 and 0.5, and AReaL unless `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` is set, have "
        "ordinary segments**: "
        f"there it covers {covered(expandable=False):.0%} of the combinations, and `memfit.margin={ninety:.2f}` "
        f"would cover nine of ten.",
        "",
    )


def _outside() -> Iterator[str]:
    yield from (
        "## Outside the allocator",
        "",
        "What people posted, beside what memfit assumes (GiB); `tests/data/overheads.yaml` has the numbers as they "
        "were posted.",
        "",
        "| what | GPUs | hardware | seen | assumed |",
        "|---|---|---|---|---|",
    )
    for o in observations()["context"]:
        where = f"{o['gpus'] or 'not said'} | {o['hardware']}"
        yield f"| [{o['what']}]({o['source']}) | {where} | {o['gib']:.2f} | {_assumed(o) / GIB:.2f} |"
    yield from ("", "| engine | TP or layers | seen |", "|---|---|---|")
    for o in (*observations()["engine"], *observations()["graphs"]):
        yield f"| [{o['what']}]({o['source']}) | {o.get('tensor_parallel', o.get('layers'))} | {o['gib']:.2f} |"
    yield ""


def _worst() -> Iterator[str]:
    yield from (
        "## The replays that needed most",
        "",
        "| above live | segments | lengths | offload | case |",
        "|---|---|---|---|---|",
    )
    for expandable in (True, False):
        chosen = sorted((r for r in replays() if r.expandable == expandable), key=lambda r: -r.above_live)[:6]
        for r in chosen:
            case = " ".join(f"{key}={value}" for key, value in r.row["case"].items() if key != "micro_batches")
            name = "expandable" if expandable else "ordinary"
            yield f"| {100 * r.above_live:.1f} % | {name} | {r.row['lengths']} | {r.row['offload']} | {case} |"

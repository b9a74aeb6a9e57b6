"""What training needs above what its tensors take, and what the default margins cover: docs/validation/reserved.md.

``python -m support.validate --write`` writes the page, from tests/data/reserved.json (``python -m tracer.make_reserved``: steps
replayed through a model of torch's allocator), tests/data/traces.json (errors of the formulas), tests/data/overheads.yaml
(public observations of what lies outside the allocator) and tests/data/verl_cases.json (public runs: the price of a margin).
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.allocator import (
    CAUTIOUS_MARGIN,
    DEFAULT_MARGIN,
    EXPANDABLE,
    FRAGMENTATION_SHARE,
    ORDINARY,
    fragmentation_bytes,
)
from hydra_plugins.memfit.memory.overheads import SERVED_TRAINER_BYTES, trainer_context_bytes
from support import case_validation
from support.trainer_validation import FORWARD, comparisons, predict, role_of
from tracer.case import Case
from tracer.make_reserved import AS_TRACED

DATA = Path(__file__).parents[1] / "data"
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
CAPACITIES = {"80 GB": 79 * GIB, "24 GB": 23 * GIB}
"""Usable bytes of two devices, for what is in bytes and not a share."""
CANDIDATES = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.10, 0.15)
"""Margins whose coverage and price the page shows."""
SEGMENTS = {True: EXPANDABLE, False: ORDINARY}


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
    def device(self) -> str:
        """The device that its tensors nearly fill, or `AS_TRACED`."""
        return str(self.row["device"])

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


def chosen(*, expandable: bool, **wanted: object) -> list[Replay]:
    """Return the replays with one kind of segments whose rows have these values."""
    return [r for r in replays() if r.expandable == expandable and wanted.items() <= r.row.items()]


def filling(*, expandable: bool) -> list[Replay]:
    """Return the replays whose tensors fill a device: what the constants are read off."""
    return [r for r in replays() if r.expandable == expandable and r.device != AS_TRACED]


def _replay(row: dict[str, Any]) -> Replay:
    case = asdict(replace(Case(**row["case"]), tokens=row["tokens"]))
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
    Return the margin that every combination of three independent errors needs, as shares of the device, in order.

    The allocator's (a replay that fills the device), the formulas' (a traced phase, where it was predicted too low it needs
    room), and that of what lies outside the allocator (a posted process).
    """
    allocator = [r.margin for r in chosen(expandable=expandable, device=device)]
    formulas = [-c.error for c in comparisons()]
    outside = [error / CAPACITIES[device] for error in context_errors()]
    return tuple(sorted(sum(errors) for errors in itertools.product(allocator, formulas, outside)))


def covered(margin: float, *, expandable: bool, device: str = "80 GB") -> float:
    """Return the share of those combinations that a margin is enough for."""
    needed = margins(expandable=expandable, device=device)
    return bisect_right(needed, margin) / len(needed)


# -- the price ------------------------------------------------------------------------------------------------------
@cache
def known_fits() -> dict[bool, tuple[tuple[str, float], ...]]:
    """Return the public FSDP runs of verl that fit, by kind of segments: name, and the margin from which they are refused."""
    found: dict[bool, list[tuple[str, float]]] = {True: [], False: []}
    for judged in map(case_validation.judge, case_validation.cases()):
        if judged.plan and judged.complete and judged.case["outcome"] == "fits" and not judged.case["megatron"]:
            expandable = judged.plan.problem.margin.expandable_segments
            found[expandable].append((judged.case["id"], refused_from(judged)))
    return {expandable: tuple(sorted(runs, key=lambda run: run[1])) for expandable, runs in found.items()}


def refused_from(judged: case_validation.Judged) -> float:
    """Return the margin from which a run is refused; beside an engine's share only a part of it is kept, in proportion."""
    assert judged.plan is not None
    problem, found = judged.plan.problem, []
    capacity, held = problem.hardware.capacity_bytes, problem.hardware.held_bytes
    for phase in judged.plan.estimate.phases:
        kept = capacity - held - phase.budget_bytes
        free = capacity - held - phase.peak_bytes
        found.append(problem.margin.share * free / kept)
    return min(found)


def refused(margin: float, *, expandable: bool) -> list[str]:
    """Return the runs that are known to fit and that a margin refuses."""
    return [name for name, limit in known_fits()[expandable] if limit < margin]


# -- the page -------------------------------------------------------------------------------------------------------
def page() -> str:
    """Return docs/validation/reserved.md."""
    return "\n".join([*_introduction(), *_replayed(), *_margin(), *_outside(), *_worst()]) + "\n"


def _introduction() -> Iterator[str]:
    versions = ", ".join(f"{name} {found}" for name, found in replays()[0].row["versions"].items())
    cases = len({json.dumps(r.row["case"]) for r in replays()})
    filled = len({json.dumps(r.row["case"]) for r in replays() if r.device != AS_TRACED})
    yield from (
        "# Reserved, not only allocated",
        "",
        "Written by `python -m support.validate --write`. People run out of memory on what torch's allocator has "
        "*reserved*: blocks are rounded, and free bytes inside a segment that is partly used serve nobody who needs "
        f"more. `python -m tracer.make_reserved` replayed {cases} traced cases, one of each kind ({versions}; "
        f"{replays()[0].row['date']}, CPU, no GPU), through a model of that allocator below a limit, as on a full "
        "device: when a segment cannot be had, everything that is wholly free is given back, and only then the request "
        "fails ([the rules](tracer.md)). The result is the smallest limit (to 0.4 %) that two steps survived.",
        "",
        f"{filled} of the cases were replayed again with as many tokens as fill a device of 24 and of 80 GB (tensors of "
        "20 and 70 GiB): only full devices run out of memory, and segments of 20 MiB weigh more on a small step. The "
        "constants are read off these.",
        "",
        "A step is four micro-batches of log-probs and four of the update, one of them full, then the optimizer step "
        "and `empty_cache`, where verl has it. States stay on the GPU, or are offloaded between passes. Adam's states "
        "are made by the first step among what is cached then. *Expandable*: as verl 0.6 and later run their trainer, "
        "what is loaded first in ordinary segments, the rest in expandable ones.",
        "",
        "Lengths are assumed, not measured. *dynamic*: packs of a token budget, of like size as verl makes them, as full "
        "as two to eight packs a step leave them. *static*: the mean of four sequences, a prompt of 2 to 15 % of the "
        "longest and a log-normal response (median 30 % of the longest, sigma 0.6, cut off at the longest). *padded*: "
        "every row is full. In each step one micro-batch, not the first, is as full as the plan says.",
        "",
    )


def _heads() -> str:
    return " | ".join(f"p{q * 100:.0f}" for q in QUANTILES)


def _figures(values: Sequence[float]) -> str:
    return " | ".join(f"{100 * quantile(values, q):.1f} %" for q in QUANTILES) + f" | {100 * max(values):.1f} %"


def _replayed() -> Iterator[str]:
    yield from ("## What replayed steps needed", "")
    yield f"| segments | device | replays | what | {_heads()} | most |"
    yield "|---|---|---|---" + "|---" * len(QUANTILES) + "|---|"
    for expandable, device in itertools.product((True, False), (AS_TRACED, *CAPACITIES)):
        found = chosen(expandable=expandable, device=device)
        for what, values in (
            ("above what is live at the peak", [r.above_live for r in found]),
            ("the same, of what an update allocates and frees", [r.share for r in found]),
        ):
            yield f"| {SEGMENTS[expandable].split()[0]} | {device} | {len(found)} | {what} | {_figures(values)} |"
    yield from (
        "",
        f"The planned term (`fragmentation`) is {FRAGMENTATION_SHARE[True]:.0%} of what a pass allocates and frees with "
        f"expandable segments and {FRAGMENTATION_SHARE[False]:.0%} without (`memory/allocator.py`): the median of the "
        "replays that fill 80 GB, in whole percents and at least one. The spread belongs to the margin. By what differs, of what "
        "an update allocates and frees on full devices of either size:",
        "",
        f"| segments | lengths | states | replays | {_heads()} | most |",
        "|---|---|---|---" + "|---" * len(QUANTILES) + "|---|",
    )
    for expandable, lengths, offload in itertools.product(
        (True, False), ("dynamic", "static", "padded"), (False, True)
    ):
        rows = [r for r in filling(expandable=expandable) if (r.row["lengths"], r.row["offload"]) == (lengths, offload)]
        if rows:
            figures = _figures([r.share for r in rows])
            yield f"| {SEGMENTS[expandable].split()[0]} | {lengths} | {_where(rows[0])} | {len(rows)} | {figures} |"
    yield from (
        "",
        "What the tail of ordinary segments is made of: the largest block, the logits of the longest micro-batch, needs a "
        "segment of its own, and the segment of a shorter one before it cannot be given back while anything that stays, "
        "a gradient or one of Adam's states, lies in it. The smaller the model and the longer its packs, the larger that "
        "hole; `entropy_from_logits_with_chunking`, a fused head, or a smaller budget of tokens make it smaller.",
        "",
    )


def _where(replay: Replay) -> str:
    return "offloaded" if replay.row["offload"] else "on the GPU"


def _margin() -> Iterator[str]:
    known = known_fits()
    yield from (
        f"## The default margin: {DEFAULT_MARGIN[EXPANDABLE]:.0%} with expandable segments, "
        f"{DEFAULT_MARGIN[ORDINARY]:.0%} with ordinary ones",
        "",
        "`memfit.margin` is there for what no term predicts: the allocator beyond its term (the replays on full "
        "devices), the formulas (every traced phase of [trainer.md](trainer.md), too low by so much) and what lies "
        "outside the allocator (the posted processes below). Every combination of one of each, taken to be independent, "
        "as a share of the device:",
        "",
        "| segments | device | combinations | " + _heads() + " | most |",
        "|---|---|---" + "|---" * len(QUANTILES) + "|---|",
    )
    for expandable, device in itertools.product((True, False), CAPACITIES):
        needed = margins(expandable=expandable, device=device)
        yield f"| {SEGMENTS[expandable].split()[0]} | {device} | {len(needed)} | {_figures(needed)} |"
    yield from (
        "",
        "What a margin covers of them, and what it costs: how many of the public FSDP runs that are known to have trained "
        "([cases.md](cases.md)) it would refuse.",
        "",
        "| margin | expandable, 80 GB | 24 GB | refused of "
        f"{len(known[True])} | ordinary, 80 GB | 24 GB | refused of {len(known[False])} |",
        "|---|---|---|---|---|---|---|",
    )
    for margin in CANDIDATES:
        cells = []
        for expandable in (True, False):
            shares = [f"{covered(margin, expandable=expandable, device=device):.1%}" for device in CAPACITIES]
            cells += [*shares, str(len(refused(margin, expandable=expandable)))]
        yield f"| {margin:.0%} | " + " | ".join(cells) + " |"
    yield from ("", *_why())


def _shares(*, expandable: bool) -> str:
    margin = DEFAULT_MARGIN[SEGMENTS[expandable]]
    parts = [f"{covered(margin, expandable=expandable, device=device):.0%} on {device}" for device in CAPACITIES]
    return f"{parts[0]} of the combinations, {parts[1]}"


def _why() -> Iterator[str]:
    name, limit = known_fits()[False][0]
    yield from (
        f"**Expandable segments, {DEFAULT_MARGIN[EXPANDABLE]:.0%}** (the trainer of verl 0.6 and later): "
        f"{_shares(expandable=True)}. What is left there is one process of 16 H800s that was posted with "
        f"{max(context_errors()) / GIB:.2f} GiB more than is assumed, {max(context_errors()) / CAPACITIES['24 GB']:.1%} of "
        "24 GB.",
        "",
        f"**Ordinary segments, {DEFAULT_MARGIN[ORDINARY]:.0%}** (verl 0.4 and 0.5; AReaL and supervised fine-tuning unless "
        f"`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` is exported): {_shares(expandable=False)}. The distribution "
        f"would have it larger: {CAUTIOUS_MARGIN:.0%} for 95 % on 80 GB. The price would be runs that are known to have "
        f"trained: `{name}` is refused from {limit:.1%} on. So the default is the largest whole percent that refuses none "
        "of them, and a plan between the two margins says that it is.",
        "",
        "That run is half of a public pair: Qwen2-14B with LoRA and Ulysses on two 80 GB GPUs (verl 0.4.1) ran with 58 "
        "sequences a GPU and died with 59. " + "; ".join(_pair(name)) + ". The verdict changes where the truth did.",
        "",
    )


def _pair(name: str) -> Iterator[str]:
    """What the device has beyond predicted tensors and context on either side of the public boundary."""
    for judged in map(case_validation.judge, case_validation.cases()):
        if judged.plan and judged.case["id"] in (name, name.replace("58pergpu-fits", "59pergpu-oom")):
            phase, plan = judged.plan.binding_phase, judged.plan
            tensors = phase.peak_bytes - phase.components.fragmentation
            left = (plan.problem.hardware.capacity_bytes - tensors) / GIB
            kept = (plan.problem.hardware.capacity_bytes - phase.budget_bytes + phase.components.fragmentation) / GIB
            yield (
                f"`{judged.case['id']}` leaves {left:.2f} GiB of the device beyond predicted tensors and context, "
                f"of which term and margin ask {kept:.2f}"
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
        "| above live | segments | device | tokens | lengths | states | case |",
        "|---|---|---|---|---|---|---|",
    )
    for expandable in (True, False):
        for r in sorted(filling(expandable=expandable), key=lambda r: -r.above_live)[:6]:
            told = (f"{key}={value}" for key, value in r.row["case"].items() if key not in ("micro_batches", "tokens"))
            head = f"| {100 * r.above_live:.1f} % | {SEGMENTS[expandable].split()[0]} | {r.device} | {r.row['tokens']} "
            yield f"{head}| {r.row['lengths']} | {_where(r)} | {' '.join(told)} |"

"""Public verl runs that fitted or died, judged by memfit: the page docs/validation/cases.md (support.validate writes it).

The runs are data (tests/data/verl_cases.json): where each was
published, its settings, and what happened. They are judged as they stand, nothing is tuned to them. Runs on GSM8K are judged
at the lengths that its logs show (345 tokens on average), not at the configured maximum.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import MemfitError, NotModelled
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.cli.launch import read_launch
from hydra_plugins.memfit.cli.main import parse
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.planning.search import check

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "data" / "verl_cases.json"

_DECIDING = ("actor_rollout_ref.actor.", "actor_rollout_ref.rollout.")
"""Sections of the micro-batches without which a published config says little."""


@dataclass(frozen=True)
class Judged:
    """One public run and memfit's verdict; ``plan`` is missing where memfit refuses to judge."""

    case: dict[str, Any]
    plan: Plan | None
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """``fits``, ``oom`` or ``not judged``."""
        if self.plan is None:
            return "not judged"
        return "fits" if self.plan.fits else "oom"

    @property
    def complete(self) -> bool:
        """Whether the micro-batches that decide are known: a published config often leaves them out."""
        unset = self.plan.estimate.refusals if self.plan else ()
        return bool(self.case["complete"]) and not any(message.startswith(_DECIDING) for message in unset)


def cases() -> list[dict[str, Any]]:
    """Return the runs."""
    rows: list[dict[str, Any]] = json.loads(CASES.read_text(encoding="utf-8"))["rows"]
    return rows


def judge(case: dict[str, Any]) -> Judged:
    """Return memfit's verdict on one run."""
    words = [f"++{key}={_word(value)}" for key, value in case["overrides"].items()]
    if case["megatron"]:
        words.append("++actor_rollout_ref.actor.strategy=megatron")
    words += [f"memfit.lengths.{key}={value}" for key, value in case.get("lengths", {}).items()]
    framework = case.get("framework", "verl")
    path = "actor_rollout_ref.model.path" if framework == "verl" else "model.partial_pretrain"
    words.append(f"++{path}={case['model']}")
    launch = ["--framework-version", case["version"], "--hardware", case["hardware"]]
    launch += ["--gpus", str(case["gpus"]), "--nodes", str(case["nodes"])]
    options = parse(["check", "--framework", framework, *launch, *words])
    try:
        return Judged(case, check(read_launch(options).problem))
    except NotModelled as error:
        return Judged(case, None, str(error).partition(":")[0])
    except MemfitError as error:
        return Judged(case, None, str(error)[:90])


def _word(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else str(value)


def page() -> str:
    """Return the page: how often memfit is right, then one row a run."""
    judged = [judge(case) for case in cases()]
    counts = Counter((j.case["megatron"], j.case["outcome"], j.verdict) for j in judged if j.complete and j.plan)
    backends = {False: "FSDP", True: "Megatron"}
    lines = [
        "# Known fits and out-of-memory errors",
        "",
        "Written by `python -m support.validate --write` from `tests/data/verl_cases.json`. Each run is judged as "
        "published (`memfit check`); GSM8K at its real mean length.",
        "",
        "| trainer | known | judged `fits` | judged `oom` |",
        "|---|---|---|---|",
        *(
            f"| {name} | {known} | {counts[megatron, known, 'fits']} | {counts[megatron, known, 'oom']} |"
            for megatron, name in backends.items()
            for known in ("fits", "oom")
        ),
        "",
        "Only runs whose micro-batches are published count in this table; the others are marked `partial` below.",
        "",
        "| run | hardware | verl | known | memfit | phase | peak / budget | what is not known, or not modelled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for j in judged:
        lines.append(_row(j))
    return "\n".join(lines) + "\n"


def _row(j: Judged) -> str:
    case = j.case
    name = f"[{case['id']}]({case['source']})" if case["source"] else case["id"]
    head = f"| {name} | {case['nodes']}x{case['gpus']} {case['hardware']} | {case['version']} | {case['outcome']} "
    if j.plan is None:
        return head + f"| {j.verdict} | | | {_joined(j.refusal, case.get('note', ''))} |"
    phase = j.plan.binding_phase
    mark = "" if j.complete else "partial"
    short = "; ".join(s.why for s in j.plan.estimate.shortfalls)
    peak = f"{gib(phase.peak_bytes)} / {gib(phase.budget_bytes)}"
    return head + f"| {j.verdict} | {phase.name} | {peak} | {_joined(mark, case.get('note', ''), short)} |"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)

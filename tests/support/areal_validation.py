"""Public AReaL runs judged by memfit: the page docs/validation/areal.md (support.validate writes it).

The runs are tests/data/areal_cases.json, judged as published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from support.areal_launch import GIB, cases, of_case, phase

_HEAD = """# AReaL: known runs

Written by `python -m support.validate --write` from `tests/data/areal_cases.json`; a test compares. Each
run is judged as published (`memfit check`, default margin). Only FSDP runs are judged; none of them was measured by this
project. Every run stores its states in bf16: no public run of the fp32 default of the wheel 1.0.4 was found.

| known | judged `fits` | judged `oom` | refused |
|---|---|---|---|
"""
_PROCESSES = """
## Processes at the moment of death

The sizes that the out-of-memory messages name, and what memfit predicts at the first moment above the GPU's capacity. The
three server sizes were used to choose one constant (`SGLANG_PREFILL_TOKENS` in `hydra_plugins/memfit/memory/overheads.py`);
the trainer's sizes were not used for anything. A trainer that dies holds what the server left: its observed size is that,
less the allocation that failed; the prediction includes that allocation.

| run | server: seen | predicted | | trainer: seen + asked for | predicted | |
|---|---|---|---|---|---|---|
"""
_DEVICE = """
## Most of the device that was in use

The logs read `device used` between steps: memory that torch's allocator caches counts as used there. A prediction is what
the run needs, so it should lie below.

| run | seen | predicted | |
|---|---|---|---|
"""
_ALL = """
## All runs

| run | hardware | known | confidence | memfit | phase | peak of budget |
|---|---|---|---|---|---|---|
"""


def verdict(answer: dict[str, Any]) -> str:
    """Return ``fits``, ``oom`` or ``refused`` for memfit's JSON answer, empty where it refused."""
    return "refused" if not answer else "fits" if answer["fits"] else "oom"


def _asked_gib(measured: dict[str, float]) -> float:
    return measured.get("failed_alloc_gib", measured.get("failed_alloc_mib", 48) / 1024)


def _off(predicted: float, seen: float) -> str:
    return f"{predicted / seen - 1:+.1%}"


def judged() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Yield every run, memfit's answer to it, and what it said on stderr."""
    for case in cases():
        yield (case, *of_case(case))


def page() -> str:
    """Return the page."""
    runs = list(judged())
    counts = Counter((case["outcome"], verdict(answer)) for case, answer, _ in runs)
    text = _HEAD
    for known in ("fits", "oom"):
        text += f"| {known} | {' | '.join(str(counts[known, v]) for v in ('fits', 'oom', 'refused'))} |\n"
    text += _PROCESSES + "".join(_process_row(case, answer) for case, answer, _ in runs)
    text += _DEVICE + "".join(_device_row(case, answer) for case, answer, _ in runs)
    return text + _ALL + "".join(_row(case, answer, err) for case, answer, err in runs)


def _process_row(case: dict[str, Any], answer: dict[str, Any]) -> str:
    seen = case["measured"]
    if "trainer_process_gib" not in seen:
        return ""
    predicted = {name: size / GIB for name, size in phase(answer)["processes"].items()}
    trainer = seen["trainer_process_gib"] + _asked_gib(seen)
    server = "| not reported | | "
    if "server_process_gib" in seen:
        its = seen["server_process_gib"]
        server = f"| {its:.2f} GiB | {predicted['engine']:.2f} GiB | {_off(predicted['engine'], its)} "
    else:
        server = f"| not reported | {predicted['engine']:.2f} GiB | "
    its = f"{trainer:.2f} GiB | {predicted['trainer']:.2f} GiB | {_off(predicted['trainer'], trainer)}"
    return f"| {case['id']} {server}| {its} |\n"


def _device_row(case: dict[str, Any], answer: dict[str, Any]) -> str:
    if "device_used_max_gib" not in case["measured"]:
        return ""
    seen, predicted = case["measured"]["device_used_max_gib"], answer["peak_bytes"] / GIB
    return f"| {case['id']} | {seen:.2f} GiB | {predicted:.2f} GiB | {_off(predicted, seen)} |\n"


def _row(case: dict[str, Any], answer: dict[str, Any], err: str) -> str:
    head = f"| {case['id']} | {case['hardware']} | {case['outcome']} | {case['confidence']} | {verdict(answer)} "
    if not answer:
        return head + f"| | {err.removeprefix('memfit: ').split('. ')[0].split(';')[0].strip()} |\n"
    found = phase(answer)
    return head + f"| {found['name']} | {found['peak_bytes'] / GIB:.2f} of {found['budget_bytes'] / GIB:.2f} GiB |\n"

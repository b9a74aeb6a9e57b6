"""A diagnosis as lines of text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from hydra_plugins.memfit.base.units import GIB, MIB, gib
from hydra_plugins.memfit.diagnosis.diagnose import Diagnosis
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.diagnosis.remedy import Remedy
from hydra_plugins.memfit.diagnosis.stream import STDIN
from hydra_plugins.memfit.diagnosis.terms import Term
from hydra_plugins.memfit.memory.breakdown import PhaseEstimate
from hydra_plugins.memfit.report.json import to_dict as plan_to_dict

_WIDTH = 110
_LABEL = 12
_MOST_OTHERS = 5


def lines(diagnosis: Diagnosis) -> list[str]:
    """Return the report, without colours: it is read in terminals, files and issue threads."""
    cause = diagnosis.cause
    if cause is None:
        return [*_nothing(diagnosis), *_labelled("note", diagnosis.notes)]
    return [
        f"memfit: {cause.kind.title}{_when(cause)}",
        *_labelled("said", [cause.text]),
        *_labelled("where", [_where(diagnosis, cause)]),
        *_labelled("memory", _memory(diagnosis, cause)),
        *_labelled("term", [_term(term) for term in diagnosis.terms]),
        *_labelled("means", diagnosis.remarks),
        *_labelled("predicted", _predicted(diagnosis.remedy)),
        *_labelled("also", _others(diagnosis, cause)),
        *_labelled("note", diagnosis.notes),
        *_remedy(diagnosis, cause),
    ]


def size(num_bytes: int) -> str:
    """Sizes below a GiB in MiB, as the messages have them."""
    return gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / MIB:.2f} MiB"


def _nothing(diagnosis: Diagnosis) -> list[str]:
    scan = diagnosis.scan
    return [f"memfit: no known failure in {_name(diagnosis)} ({scan.num_lines} lines, {scan.num_bytes} bytes)"]


def _name(diagnosis: Diagnosis) -> str:
    return "stdin" if diagnosis.log == STDIN else diagnosis.log


def _labelled(label: str, sentences: Any) -> Iterator[str]:
    for index, sentence in enumerate(sentences):
        first = f"  {label if index == 0 else '':{_LABEL - 2}}"
        yield from textwrap.wrap(
            sentence,
            _WIDTH,
            initial_indent=first,
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _when(cause: Finding) -> str:
    phase = f", in {cause.phase}" if cause.phase else ""
    return phase if cause.step is None else f"{phase}, after step {cause.step}"


def _where(diagnosis: Diagnosis, cause: Finding) -> str:
    scan = diagnosis.scan
    parts = [f"line {cause.line} of {scan.num_lines} in {_name(diagnosis)}"]
    if cause.function:
        parts.append(f"in {cause.function}()")
    named = sorted(cause.processes)
    if len(named) == 1:
        parts.append(f"said by {named[0]}")
    elif named:
        parts.append(f"said by {len(named)} processes, among them {named[0]}")
    if cause.messages > 1:
        parts.append(f"{cause.messages} messages")
    if scan.runs > 1:
        parts.append(f"the last of {scan.runs} runs that failed")
    return ", ".join(parts)


def _memory(diagnosis: Diagnosis, cause: Finding) -> Iterator[str]:
    amounts = {name: amount.num_bytes for name, amount in cause.amounts.items()}
    if "asked" in amounts:
        yield f"{size(amounts['asked'])} asked for"
    if "capacity" in amounts:
        names = f" ({', '.join(diagnosis.devices)})" if diagnosis.devices else ""
        free = f", {size(amounts['free'])} free" if "free" in amounts else ""
        yield f"{size(amounts['capacity'])} on the device{names}{free}"
    elif "free" in amounts:
        yield f"{size(amounts['free'])} free"
    if "allocated" in amounts:
        yield _own_process(amounts)
    yield from (f"process {pid}: {size(held.num_bytes)}" for pid, held in cause.others)
    if "used" in amounts:
        total = f" of {size(amounts['total'])}" if "total" in amounts else ""
        yield f"{size(amounts['used'])}{total} of host memory used"
    for buffer in cause.buffers[:3]:
        yield f"{size(buffer.size.num_bytes)} {buffer.shape} {buffer.operator}".rstrip()


def _own_process(amounts: dict[str, int]) -> str:
    unused = f", {size(amounts['reserved'])} kept unused in its pool" if "reserved" in amounts else ""
    if "process" not in amounts:
        return f"this process: {size(amounts['allocated'])} allocated by torch{unused}"
    rest = amounts["process"] - amounts["allocated"] - amounts.get("reserved", 0)
    outside = f", {size(rest)} outside torch (context, NCCL, an engine's pool)" if rest > 0 else ""
    return (
        f"this process: {size(amounts['process'])} = {size(amounts['allocated'])} allocated by torch{unused}{outside}"
    )


def _term(term: Term) -> str:
    sure = "" if term.certain else "perhaps "
    source = f" ({term.source})" if term.source else ""
    return f"{sure}{size(term.num_bytes)} = {term.formula}: {term.what}{source}"


def _predicted(remedy: Remedy | None) -> Iterator[str]:
    if remedy is None or remedy.predicted is None:
        return
    phase = remedy.predicted
    parts = ", ".join(f"{name} {size(part)}" for name, part in _largest(phase))
    needs = size(phase.whole_bytes)
    yield f"{phase.name} of this launch{_release(remedy)}: {needs}, budget {size(phase.budget_bytes)}; largest: {parts}"
    if remedy.learned_bytes:
        yield (
            f"the log shows {size(remedy.learned_bytes)} more than that, which no formula explains; the plan below counts it "
            f"in {phase.name}"
        )


def _release(remedy: Remedy) -> str:
    """Which release was taken, where neither the launch nor an installed framework says it: each needs other bytes."""
    if remedy.plan is None or not remedy.plan.problem.version_assumed:
        return ""
    problem = remedy.plan.problem
    return f" ({problem.framework} {problem.framework_version} is assumed, --framework-version names another)"


def _largest(phase: PhaseEstimate) -> list[tuple[str, int]]:
    return sorted(phase.components.as_dict().items(), key=lambda item: -item[1])[:3]


def _others(diagnosis: Diagnosis, cause: Finding) -> list[str]:
    others = [finding for finding in diagnosis.scan.findings if finding is not cause]
    said = [
        f"line {finding.line}: {finding.kind.title}{_when(finding)}"
        + (" (a consequence, most likely)" if finding.kind.consequence and not cause.kind.consequence else "")
        for finding in others[:_MOST_OTHERS]
    ]
    return said + ([f"and {len(others) - _MOST_OTHERS} more"] if len(others) > _MOST_OTHERS else [])


def _remedy(diagnosis: Diagnosis, cause: Finding) -> Iterator[str]:
    remedy = diagnosis.remedy
    if diagnosis.overrides:
        yield f"What would have fitted, behind +hardware={diagnosis.hardware} ({diagnosis.launch_source}):"
        yield from (f"  {word}" for word in diagnosis.overrides)
        return
    yield from _labelled("helps", [cause.kind.advice])
    if remedy is not None and not remedy.explained:
        unknown = "" if cause.phase else " The log does not tell the phase, so nothing can be learned from the failure."
        yield from _labelled("plan", [f"memfit predicts that this launch fits ({diagnosis.launch_source}).{unknown}"])
    elif remedy is not None and remedy.refusal:
        yield from _labelled("plan", [remedy.refusal])


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis in the shape of docs/diagnose.md; bytes are ints."""
    scan, cause, remedy = diagnosis.scan, diagnosis.cause, diagnosis.remedy
    plan = remedy.plan if remedy is not None else None
    return {
        "log": diagnosis.log,
        "lines": scan.num_lines,
        "bytes": scan.num_bytes,
        "runs": scan.runs,
        "cause": None if cause is None else _finding(cause),
        "also": [_finding(finding) for finding in scan.findings if finding is not cause],
        "devices": list(diagnosis.devices),
        "terms": [_term_dict(term) for term in diagnosis.terms],
        "remarks": list(diagnosis.remarks),
        "launch": diagnosis.launch_source or None,
        "hardware": diagnosis.hardware or None,
        "explained": remedy is not None and remedy.explained,
        "learned_bytes": remedy.learned_bytes if remedy is not None else 0,
        "refusal": (remedy.refusal or None) if remedy is not None else None,
        "overrides": list(diagnosis.overrides),
        "plan": None if plan is None else plan_to_dict(plan),
        "notes": list(diagnosis.notes),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.name,
        "resource": finding.kind.resource,
        "title": finding.kind.title,
        "consequence": finding.kind.consequence,
        "advice": finding.kind.advice,
        "phase": finding.phase,
        "function": finding.function or None,
        "step": finding.step,
        "line": finding.line,
        "text": finding.text,
        "messages": finding.messages,
        "processes": sorted(finding.processes),
        "sizes": {name: amount.num_bytes for name, amount in finding.amounts.items()},
        "numbers": dict(finding.numbers),
        "others": [{"pid": pid, "bytes": size.num_bytes} for pid, size in finding.others],
        "buffers": [
            {"bytes": b.size.num_bytes, "shape": b.shape or None, "operator": b.operator or None}
            for b in finding.buffers
        ],
    }


def _term_dict(term: Term) -> dict[str, Any]:
    return {
        "what": term.what,
        "formula": term.formula,
        "bytes": term.num_bytes,
        "certain": term.certain,
        "source": term.source or None,
    }

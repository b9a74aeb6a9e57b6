"""The report for people: complete, readable on narrow and plain streams, never in the way of a launch."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, Shortfall
from hydra_plugins.memfit.planning.problem import Change, Knob, Plan
from hydra_plugins.memfit.report.overrides import override
from hydra_plugins.memfit.report.text import print_error, print_plan
from support.plans import (
    BATCH,
    BUDGET,
    DIES,
    FITS,
    MICRO_BATCH,
    MODEL,
    OFFLOAD,
    ROLLOUT,
    UPDATE,
    as_requested,
    changed,
    make_problem,
)

PLAN = changed(MICRO_BATCH, OFFLOAD, pinned=("data.train_batch_size",), warnings=("gpus_per_node is assumed",))
UNSET = Knob(key=MICRO_BATCH.key, requested=None, candidates=(4,), cost=1, required=True)
DIES_EARLY = replace(FITS, phases=(replace(UPDATE, needed_bytes=150 * GIB),))
OTHER_BUDGET = replace(FITS, phases=(replace(ROLLOUT, budget_bytes=BUDGET + GIB), UPDATE))
ROOT = Path(__file__).parents[1]


class _Stream(io.TextIOWrapper):
    """A text stream with an encoding of its own that remembers what was written."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")

    def text(self) -> str:
        self.flush()
        buffer: Any = self.buffer
        return str(buffer.getvalue().decode(self.encoding))


def report(plan: Plan, style: str = "full", encoding: str = "utf-8") -> str:
    """Return what `print_plan` writes."""
    stream = _Stream(encoding)
    print_plan(plan, style, stream=stream)
    return stream.text()


def words_of(text: str) -> str:
    """Return ``text`` without the frame and line breaks, so that wrapped sentences can be searched."""
    return " ".join(re.sub(r"[│|╭╰╮╯─+]", " ", text).split())


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize(
    "fact",
    [
        "verl 0.9.1 on 1 x h200",
        "fits with 2 changed values: update_actor is the tightest, 91.00 GiB of 130.00 GiB",
        "NVIDIA H200, 139.70 GiB usable (conf/hardware/h200.yaml), 1.00 GiB held by other processes",
        "5% kept free (memfit.margin=0.05, expandable segments)",
        "Qwen/Qwen2.5-3B-Instruct, 3.09 B parameters (conf/model/qwen2.5-3b.yaml)",
        "host 90.00 GiB of 1500.00 GiB",
        "old_log_prob 206.00 40.00 130.00",
        "▶ update_actor 91.00 91.00 130.00",
        "largest in update_actor: logits 40.00 GiB, optimizer_states 24.00 GiB, weights 12.00 GiB",
        "as requested it does not fit: old_log_prob needs 206.00 GiB, 76.00 GiB over its budget of 130.00 GiB",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu 32 -> 4 fewer sequences in one forward pass",
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload false -> true the Adam moments wait in host memory",
        "training unchanged",
        "pinned, left as they are data.train_batch_size",
        "warnings • gpus_per_node is assumed",
    ],
)
def test_the_panel_says(fact: str) -> None:
    """The panel says what was read, what is predicted, what was changed and why, and what was left alone."""
    assert fact in words_of(report(PLAN))


@pytest.mark.parametrize(
    ("plan", "fact"),
    [
        (as_requested(), "fits as requested: update_actor is the tightest"),
        (as_requested(DIES_EARLY), "▶ update_actor 150.00 130.00"),
        (as_requested(DIES_EARLY), "largest in update_actor when 91.00 GiB are reached and it dies: logits 40.00 GiB"),
        (as_requested(DIES_EARLY), "does not fit: update_actor needs 150.00 GiB, 20.00 GiB over its budget"),
        (as_requested(DIES), "does not fit: old_log_prob needs 206.00 GiB, 76.00 GiB over its budget of 130.00 GiB"),
        (changed(BATCH), "TRAINING CHANGES: data.train_batch_size"),
        (changed(BATCH), "64 -> 32 fewer prompts in one step (changes training)"),
        (
            as_requested(
                Estimate(phases=PLAN.estimate.phases, host=HostEstimate(peak_bytes=3 << 30, budget_bytes=2 << 30))
            ),
            "does not fit: the host needs 3.00 GiB of memory, 1.00 GiB over its budget of 2.00 GiB",
        ),
        (
            as_requested(
                Estimate(
                    phases=PLAN.estimate.phases,
                    shortfalls=(Shortfall(phase="rollout", num_bytes=5, why="no block of the cache fits"),),
                )
            ),
            "does not fit: rollout: no block of the cache fits",
        ),
    ],
)
def test_the_verdict_says_what_decides(plan: Plan, fact: str) -> None:
    """The first sentence names the phase, the engine or the host that decides; changes of training are loud."""
    assert fact in words_of(report(plan))


@pytest.mark.parametrize(
    ("plan", "fact"),
    [
        (as_requested(version_assumed=True), "version 0.9.1, assumed: verl is not installed here"),
        (
            replace(
                changed(replace(MICRO_BATCH, old=None), problem=make_problem(DIES, knobs=(UNSET,))),
                requested=replace(DIES, refusals=("it is unset",)),
            ),
            f"asked: {MICRO_BATCH.key} unset, so the whole batch is counted in one piece",
        ),
        (as_requested(OTHER_BUDGET), "budgets differ: an engine's share is set, not predicted, and needs no margin"),
        (changed(MICRO_BATCH, pinned=tuple(f"a.b{i}" for i in range(30))), "a.b6, a.b7 and 22 more"),
    ],
    ids=["version", "unset", "budgets", "pins"],
)
def test_what_a_reader_may_stumble_over_is_explained(plan: Plan, fact: str) -> None:
    """An assumed version, a whole batch in the column of what was asked, two budgets, dozens of pins: each has its words."""
    assert fact in words_of(report(plan))
    assert fact not in words_of(report(PLAN))


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width, no line is longer, and the frame closes."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = report(PLAN).splitlines()
    assert max(map(len, lines)) <= columns
    assert len({len(line) for line in lines}) == 1


def test_sixty_columns_keep_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 60 columns nothing of the table is cut off."""
    monkeypatch.setenv("COLUMNS", "60")
    assert re.search(r"old_log_prob +206\.00 +40\.00 +130\.00 .*31%", report(PLAN))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stream_that_is_not_unicode_gets_plain_characters(encoding: str) -> None:
    """A stream that cannot hold the frame gets an ASCII one; what it cannot hold at all becomes a question mark."""
    text = report(changed(MICRO_BATCH, warnings=("模型 is a warning",)), encoding=encoding)
    assert text.isascii()
    assert "?? is a warning" in text
    assert "> update_actor" in words_of(text).replace(">  ", "> ")


def test_a_file_gets_no_escape_codes() -> None:
    """What is not a terminal gets no colour."""
    assert "\x1b" not in report(PLAN)


@pytest.mark.parametrize(("no_color", "has_colour"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_told_otherwise(no_color: str, has_colour: bool) -> None:
    """On a real pseudo-terminal the panel is coloured; with NO_COLOR it is not."""
    colours = re.findall(rb"\x1b\[[0-9;]*m", _on_a_terminal({"NO_COLOR": no_color}))
    assert any(re.search(rb"\[(?:1;)?3\d", code) for code in colours) == has_colour


def test_a_long_error_is_wrapped_on_a_terminal_alone() -> None:
    """A list of dozens of names is broken between names on a terminal, and stays one line in a log."""
    code = "from hydra_plugins.memfit.cli.main import main; assert main(['check', '--hardware', 'h2x']) == 2"
    shown = _on_a_terminal({"COLUMNS": "60"}, code).decode().splitlines()
    assert len(shown) > 3 and max(map(len, shown)) <= 60
    assert {"rtx4090,", "a100-80,", "v100-32."} & set(" ".join(shown).split())
    command = [sys.executable, "-m", "hydra_plugins.memfit.cli.main", "check", "--hardware", "h2x"]
    logged = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert logged.stderr.count("\n") == 1


_PRINTS_A_PLAN = (
    "from support.plans import as_requested; from hydra_plugins.memfit.report.text import print_plan;"
    "print_plan(as_requested())"
)


def _on_a_terminal(environ: dict[str, str], code: str = _PRINTS_A_PLAN) -> bytes:
    ours, theirs = pty.openpty()
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "COLUMNS": "100", **environ}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=theirs, env=env)
    os.close(theirs)
    written = bytearray()
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return bytes(written)


def test_short_is_one_line_and_off_is_silent() -> None:
    """`short` says launch and verdict in one line; `off` says nothing."""
    assert report(PLAN, "short").startswith("memfit: verl 0.9.1 on 1 x h200: fits with 2 changed values")
    assert report(PLAN, "short").count("\n") == 1
    assert report(PLAN, "off") == ""


@pytest.mark.parametrize("style", ["full", "short", "off"])
def test_an_error_is_said_in_every_style(style: str) -> None:
    """`memfit.report=off` silences plans, not errors."""
    stream = _Stream()
    print_error(ConfigError("unknown hardware 'h20x'."), style, stream=stream)
    assert "unknown hardware 'h20x'." in stream.text()


@pytest.mark.parametrize(
    ("proposals", "last_words"),
    [
        (
            (BATCH, OFFLOAD),
            "This would fit (it changes training, and memfit.allow_semantic=true lets memfit do it):\n"
            "  data.train_batch_size=32\n",
        ),
        (
            (MICRO_BATCH, OFFLOAD),
            f"This would fit (it releases the pinned {MICRO_BATCH.key}):\n  {MICRO_BATCH.key}=4\n",
        ),
        ((OFFLOAD,), f"This would fit:\n  {OFFLOAD.key}=true\n"),
    ],
    ids=["training", "pin", "knob"],
)
def test_a_refusal_ends_with_the_smallest_change_that_would_fit(proposals: tuple[Change, ...], last_words: str) -> None:
    """When nothing fits, what was tried is shown, and what the user has to change stands outside the frame."""
    plan = Plan(
        problem=make_problem(DIES),
        requested=DIES,
        estimate=DIES,
        changes=(OFFLOAD,),
        pinned=(MICRO_BATCH.key,),
        proposals=proposals,
    )
    stream = _Stream()
    print_error(NoPlanFits("no plan fits. A long list of values.", plan), stream=stream)
    text = stream.text()
    assert text.endswith(last_words)
    assert "no plan fits: old_log_prob needs 206.00 GiB, 76.00 GiB over its budget" in words_of(text)
    assert "largest in old_log_prob: logits 190.00 GiB" in words_of(text)
    assert "asked at best budget" in words_of(text)
    assert "tried, and not enough" in text and "training unchanged" not in text


def test_a_refusal_without_a_way_out_says_the_error_itself() -> None:
    """Where no change would fit, the planner's own sentence stands in the panel."""
    plan = Plan(problem=make_problem(DIES), requested=DIES, estimate=DIES)
    stream = _Stream()
    print_error(NoPlanFits("no plan fits. Use more GPUs.", plan), stream=stream)
    assert "no plan fits. Use more GPUs." in stream.text()
    assert "would fit" not in stream.text()


def test_a_stream_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed stream, a reader that left, and a process without stderr do not stop a launch."""
    closed = io.StringIO()
    closed.close()
    print_plan(PLAN, "short", stream=closed)
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as gone:  # closing it raises; printing must not
        print_plan(PLAN, stream=gone)
        print_plan(PLAN, stream=gone)
    monkeypatch.setattr(sys, "stderr", None)
    print_plan(PLAN)


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, 4, -1, 0.55, 1e-06, "auto", "a b", "it's", "null", "3", "a,b", "", "c:\\x\\", "Qwen/Q-3B"],
)
def test_an_override_to_paste_reads_back_as_the_same_value(value: Any) -> None:
    """Through a shell and Hydra's grammar, a pasted override gives the same value with the same type."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = subprocess.run(
        ["sh", "-c", f"printf %s {override('a.b', value)}"], capture_output=True, text=True, check=True
    )
    parsed = OverridesParser.create().parse_override(word.stdout)
    assert parsed.key_or_group == "a.b"
    assert (type(parsed.value()), parsed.value()) == (type(value), value)


def test_brackets_in_names_are_text() -> None:
    """Names that look like markup are printed as they are."""
    change = Change(key="a[0].b", old="[red]", new="[/red]", kind="neutral", why="[bold]why[/bold]")
    assert "[red] -> [/red] [bold]why[/bold]" in words_of(report(changed(change)))
    assert MODEL.name in words_of(report(PLAN))

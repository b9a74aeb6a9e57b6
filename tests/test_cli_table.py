"""`memfit table`: the planner's answers side by side."""

from __future__ import annotations

import csv
import io
import json

import pytest

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.cli import main as console
from hydra_plugins.memfit.report.table import FORMATS, Row

LAUNCH = (
    "--framework",
    "verl",
    "--model",
    "qwen2.5-7b",
    "algorithm.adv_estimator=grpo",
    "--framework-version",
    "0.9.1",
)
PINNED = ("memfit.pin=[actor_rollout_ref.actor.strategy]",)
TABLE = ("table", *LAUNCH, *PINNED, "--hardware", "a40,h200", "--gpus", "8")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a host without accelerator and network."""
    monkeypatch.delenv("MEMFIT_HARDWARE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    status = console.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_a_row_is_what_plan_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Each combination has the numbers, the values and the verdict of `memfit plan`."""
    status, out, _ = printed(capsys, *TABLE, "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["hardware"], row["gpus"]) for row in rows] == [("a40", 8), ("h200", 8)]
    for row in rows:
        options = ("--hardware", row["hardware"], "--gpus", str(row["gpus"]))
        plan_status, document, _ = printed(capsys, "plan", *LAUNCH, *PINNED, *options, "--json")
        plan = json.loads(document)
        assert row["fits"] == plan["fits"] == (plan_status == 0)
        assert (row["binding_phase"], row["budget_bytes"]) == (plan["binding_phase"], plan["budget_bytes"])
        if row["fits"]:
            wanted = [change["key"] for change in plan["changes"]]
            assert [text.strip("'+").partition("=")[0] for text in row["overrides"]] == wanted


ROWS = (
    Row(hardware="a40", gpus=1, nodes=2, binding_phase="launch", peak_bytes=3 << 30, budget_bytes=2 << 30, reason="a | b"),
    Row(hardware="h20", gpus=8, nodes=1, fits=True, peak_bytes=2 << 30, budget_bytes=3 << 30,
        overrides=("actor.x.size=1", "ref.x.size=2", "'++u.a=\"b\"'")),
    Row(hardware="v4-8", gpus=0, nodes=0, reason="not modelled", error=MemfitError("not modelled")),
)  # fmt: skip


def test_formats_hold_every_row() -> None:
    """CSV has every field; Markdown and the terminal's table shorten keys as far as they stay apart."""
    cells = list(csv.DictReader(io.StringIO(FORMATS["csv"](ROWS))))
    assert [(cell["hardware"], int(cell["peak_bytes"]), cell["reason"]) for cell in cells] == [
        (row.hardware, row.peak_bytes, row.reason) for row in ROWS
    ]
    markdown = FORMATS["markdown"](ROWS).splitlines()
    assert markdown[2] == r"| 2 x 1 x a40 | no | launch | 3.00 of 2.00 | a \| b |"
    assert markdown[3].startswith("| 8 x h20 | yes |  | 2.00 of 3.00 | `actor.x.size=1`, `ref.x.size=2`, ")
    text = FORMATS["terminal"](ROWS)
    assert max(map(len, text.splitlines())) <= 100
    assert [line.split("  ")[0] for line in text.splitlines() if " x " in line[:12]] == ["2 x 1 x a40", "8 x h20"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--hardware", "a40,v4-8", "--gpus", "8"), 0, "verl on v4-8 (tpu) is not modelled"),
        (("--hardware", "l4", "--gpus", "1", *PINNED), 3, "over its budget"),
        (("--hardware", "v4-8", "--gpus", "8"), 2, "verl on v4-8 (tpu) is not modelled"),
        (("--hardware", "a40,h20x"), 2, "unknown hardware 'h20x'"),
        (("--hardware", "a40", "data.train_batchsize=1"), 2, "Did you mean data.train_batch_size?"),
    ],
)
def test_what_fits_nowhere_or_cannot_be_judged(
    arguments: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A combination that is not modelled is a row; a slip, or nothing that can be judged, is an error."""
    got, out, err = printed(capsys, "table", *LAUNCH, *arguments, "--format", "csv")
    assert got == status
    assert message in (err if status == 2 else out)

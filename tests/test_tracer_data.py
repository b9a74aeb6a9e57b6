"""The stored traces: complete, consistent, and split before anybody looked at them."""

from __future__ import annotations

from collections import Counter

import pytest

from tracer.case import Case, parse
from tracer.make_data import read, split
from tracer.rows import cases

ROWS = read()


def test_every_case_of_the_table_is_stored_once() -> None:
    """The file holds exactly the cases of tracer.rows, in their order."""
    assert [Case(**row["case"]) for row in ROWS] == cases()


def test_split_is_drawn_from_the_case_alone() -> None:
    """A row is fitted or held out by the seed, and both halves are of like size."""
    assert all(row["split"] == split(Case(**row["case"])) for row in ROWS)
    sizes = Counter(row["split"] for row in ROWS)
    assert set(sizes) == {"fit", "held_out"}
    assert min(sizes.values()) > 0.4 * len(ROWS)


def test_breakdowns_sum_to_their_peaks() -> None:
    """What is alive at a peak adds up to it, and the allocator reserved no less than that."""
    for row in ROWS:
        for name, phase in row["phases"].items():
            where = (row["case"], name)
            assert sum(phase["breakdown"].values()) == phase["peak_allocated_bytes"], where
            assert phase["start_allocated_bytes"] <= phase["peak_allocated_bytes"] <= phase["peak_reserved_bytes"], (
                where
            )


@pytest.mark.parametrize(
    ("role", "phases"),
    [
        ("actor", {"log_prob", "update", "optimizer_step"}),
        ("ref", {"ref_log_prob"}),
        ("critic", {"values", "update", "optimizer_step"}),
    ],
)
def test_each_role_has_its_phases(role: str, phases: set[str]) -> None:
    """A reference has no update, and values take the place of a critic's log-probs."""
    rows = [row for row in ROWS if row["case"]["role"] == role]
    assert rows
    assert all(set(row["phases"]) == phases for row in rows)


def test_resident_states_follow_from_the_parameters() -> None:
    """Full training in fp32 starts its log-probs with 12 bytes a parameter, shared by the ranks."""
    for row in ROWS:
        case = row["case"]
        partly = case["lora_rank"] or case.get("frozen_vision")
        if case["role"] == "actor" and not partly and case["master_dtype"] == "fp32":
            expected = 12 * row["parameters"] / case["ranks"]
            assert row["phases"]["log_prob"]["start_allocated_bytes"] == pytest.approx(expected, rel=2e-3), case


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ddp"}, "strategy='ddp'; valid: fsdp, fsdp2"),
        ({"padded": True, "sequences": 3}, "a padded batch needs tokens divisible by sequences"),
        ({"padded": True, "fused": "torch"}, "fused=none"),
        ({"image_tokens": 5000}, "image_tokens=5000 are more than tokens=4096"),
        ({"ulysses": 3}, "tokens=4096 is not divisible by ulysses=3"),
    ],
)
def test_a_case_that_cannot_run_is_refused(options: dict[str, object], message: str) -> None:
    """A wrong option is named together with what would be right."""
    with pytest.raises(ValueError, match=message):
        Case(**options)  # type: ignore[arg-type]


def test_the_command_line_reads_every_option() -> None:
    """Options of the command are the fields of a case."""
    line = [
        "--model",
        "qwen3-8b",
        "--tokens",
        "8192",
        "--no-checkpointing",
        "--strategy",
        "fsdp2",
        "--temperature",
        "0.7",
    ]
    expected = Case(model="qwen3-8b", tokens=8192, checkpointing=False, strategy="fsdp2", temperature=0.7)
    assert parse(line) == expected

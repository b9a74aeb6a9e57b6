"""Public logs of failures: each is told for what it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.diagnosis.catalogue import ROWS
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.diagnosis.kinds import KINDS
from hydra_plugins.memfit.diagnosis.scan import scan
from hydra_plugins.memfit.diagnosis.stream import open_log
from hydra_plugins.memfit.memory.breakdown import PHASES

LOGS = Path(__file__).parent / "data" / "logs"
INDEX: dict[str, dict[str, Any]] = yaml.safe_load((LOGS / "index.yaml").read_text(encoding="utf-8"))


def cause_of(name: str) -> Finding:
    """Return the cause that is found in one of the logs."""
    with open_log(str(LOGS / f"{name}.log")) as file:
        cause = scan(file).cause
    assert cause is not None
    return cause


@pytest.mark.parametrize("name", INDEX)
def test_a_public_log_is_told(name: str) -> None:
    """The kind, the phase, the function, every number and who said it are those of the log."""
    cause, expected = cause_of(name), INDEX[name]
    assert {
        "kind": cause.kind.name,
        "phase": cause.phase,
        "function": cause.function or None,
        "sizes": {key: round(amount.num_bytes / GIB, 2) for key, amount in cause.amounts.items()},
        "numbers": dict(cause.numbers),
        "processes": sorted(cause.processes),
        "messages": cause.messages,
    } == {
        "kind": expected["kind"],
        "phase": expected.get("phase"),
        "function": expected.get("function"),
        "sizes": expected.get("sizes", {}),
        "numbers": expected.get("numbers", {}),
        "processes": expected.get("processes", []),
        "messages": expected.get("messages", 1),
    }


def test_every_log_has_a_source_and_every_kind_a_log() -> None:
    """Logs and index name each other; what the catalogue knows and no public log shows is listed here."""
    assert {path.stem for path in LOGS.glob("*.log")} == set(INDEX)
    assert all(entry["source"].startswith("https://") for entry in INDEX.values())
    assert set(KINDS) - {entry["kind"] for entry in INDEX.values()} == {
        "disk_full",
        "engine_profiling",
        "host_allocation",
    }


def test_the_catalogue_speaks_of_known_kinds_and_phases() -> None:
    """A row has a kind that exists, a kind a phase of the calendar."""
    assert {row.kind for row in ROWS} == set(KINDS)
    assert all(kind.phase in (None, *PHASES) for kind in KINDS.values())


def test_the_page_lists_every_kind() -> None:
    """The table on the page of the command is the catalogue's."""
    page = (Path(__file__).parents[1] / "docs" / "diagnose.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)[: len(KINDS)] == [
        (kind.name, kind.title) for kind in KINDS.values()
    ]


def test_the_table_of_the_xla_compiler_is_read() -> None:
    """The largest buffers follow the message, some lines later."""
    [buffer] = cause_of("xla-hbm-table").buffers
    assert (buffer.size.num_bytes, buffer.shape) == (2 * GIB, "f32[32,4096,4096]")
    assert buffer.operator.startswith(
        "jit(casual_language_model_train_step)/jit(main)/jvp(FlaxFalconForCausalLMModule)"
    )


def test_other_processes_on_the_device_are_listed() -> None:
    """torch lists who else holds memory of the GPU; in a container its own process may look like another one."""
    [(pid, size)] = cause_of("slime-log-probs").others
    assert (pid, round(size.num_bytes / GIB, 2)) == (1990324, 3.23)
    assert cause_of("verl-old-log-prob").others == ()

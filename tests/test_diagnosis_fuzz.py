"""Logs are untrusted: whatever stands in one, a scan ends with an answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.diagnosis.catalogue import NEEDLES
from hydra_plugins.memfit.diagnosis.logged import LAUNCH_NEEDLES
from hydra_plugins.memfit.diagnosis.scan import scan

LINES = [
    line for path in (Path(__file__).parent / "data" / "logs").glob("*.log") for line in path.read_bytes().splitlines()
]
_NOISE = st.one_of(
    st.sampled_from(LINES),
    st.sampled_from(
        (
            *NEEDLES,
            *LAUNCH_NEEDLES,
            b'File "',
            b"ray::",
            b"\x1b[31m",
            b"(",
            b"pid=",
            b"{'",
            b"}",
            b"\r",
            b"GiB",
            b"9" * 400,
        )
    ),
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
)


@st.composite
def logs(draw: st.DrawFn) -> bytes:
    """Lines of public logs, cut, spliced and mixed with noise."""
    lines = []
    for _ in range(draw(st.integers(0, 12))):
        parts = []
        for _ in range(draw(st.integers(1, 4))):
            noise = draw(_NOISE)
            start = draw(st.integers(0, len(noise)))
            parts.append(noise[start:] if draw(st.booleans()) else noise)
        lines.append(b"".join(parts))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\r", b""])).join(lines)


def check(data: bytes) -> None:
    """A scan counts every byte and says nothing that no line says."""
    result = scan(io.BytesIO(data))
    assert result.num_bytes == len(data)
    assert len(result.findings) <= 64
    for finding in result.findings:
        assert 1 <= finding.line <= result.num_lines
        assert finding.messages >= 1 and len(finding.text) <= 600
        assert all(amount.num_bytes >= 0 for amount in finding.amounts.values())


@settings(max_examples=25)
@given(logs())
def test_mixed_lines_are_survived(data: bytes) -> None:
    """No mixture of known messages and noise breaks a scan."""
    check(data)


@pytest.mark.fuzz
@settings(max_examples=3000)
@given(logs())
def test_many_mixed_lines_are_survived(data: bytes) -> None:
    """The same, longer; the tier ``atheris`` looks elsewhere each time."""
    check(data)


@pytest.mark.fuzz
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs())
def test_the_command_always_answers(tmp_path: Path, data: bytes) -> None:
    """The command ends with 0 or 3: an internal error of memfit would be 1."""
    path = tmp_path / "log"
    path.write_bytes(data)
    assert main(["diagnose", str(path), "--json", "--framework", "verl", "--hardware", "h100"]) in (0, 3)

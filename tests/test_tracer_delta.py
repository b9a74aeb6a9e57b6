"""The stand-ins for the kernels of a gated delta net against the wrappers of flash-linear-attention itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCALARS = 150_000
"""Norm weights' gradients, by multiprocessor of the device: not a matter of tokens."""


@pytest.mark.verl
def test_stand_ins_take_what_flas_wrappers_take() -> None:
    """The delta rule saves and peaks at the same bytes to the byte, the gated norm but for its weight's gradient."""
    pytest.importorskip("fla", reason="pip install --no-deps fla-core einops")
    command = [sys.executable, "-m", "support.fla_wrappers"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    fla, ours = found["rule"]
    assert fla == ours
    assert fla[1] > fla[0] > 0
    fla, ours = found["norm"]
    assert fla[:2] == ours[:2]
    assert all(0 <= theirs - our <= SCALARS for theirs, our in zip(fla[2:], ours[2:], strict=True))

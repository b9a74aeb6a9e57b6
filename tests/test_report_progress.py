"""Progress: silence for what is quick, one plain line for what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.progress import slow
from support.hub import TINY, serving
from support.hydra_app import LAUNCH, ROOT


@pytest.mark.parametrize(("takes_s", "said"), [(0.0, ""), (0.3, "memfit: looking ...\n")])
def test_only_what_is_slow_is_said(takes_s: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line once the time is over, none before; an error in the body passes through and silences the rest."""
    with slow("looking", after_s=0.1):
        time.sleep(takes_s)
    with pytest.raises(KeyError), slow("looking", after_s=0.1):
        raise KeyError
    time.sleep(0.2)
    assert capsys.readouterr() == ("", said)


def test_a_slow_hub_is_named(tmp_path: Path) -> None:
    """A download of over a second says where it waits, on stderr; stdout stays for the answer."""
    with serving() as hub:
        hub.add("org/tiny", json.dumps(TINY).encode())
        hub.delay_s = 0.12  # for each 16 bytes
        words = [
            "check",
            "--framework",
            "verl",
            "--hardware",
            "h200",
            "--json",
            "actor_rollout_ref.model.path=org/tiny",
        ]
        words += LAUNCH[1:]
        done = subprocess.run(
            [sys.executable, "-m", "hydra_plugins.memfit.cli.main", *words],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stderr.splitlines()[0] == "memfit: asking 127.0.0.1 for the config.json of org/tiny ..."
    assert json.loads(done.stdout)["model"]["name"] == "org/tiny"

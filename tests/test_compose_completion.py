"""Shell completion through Hydra's own: bash, the installed function, and what TAB would offer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_plugins.memfit.hardware.catalog import names
from support.hydra_app import MODEL, ROOT, write_app

TAB = """
eval "$(python app.py -sc install=bash)"
for line in "$@"; do
    COMP_LINE="$line" COMP_POINT=${#line}
    read -ra COMP_WORDS <<< "$line"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.slow
def test_tab_offers_the_hardware_and_the_settings(tmp_path: Path) -> None:
    """`+hardware=<TAB>` lists the files, `memfit.<TAB>` the settings behind a group; nothing is planned or said."""
    write_app(tmp_path)
    asked = (
        "python app.py +hardware=",
        f"python app.py {MODEL} +hardware=h2",
        "python app.py +hardware=h200 memfit.marg",
    )
    done = subprocess.run(
        ["bash", "-c", TAB, "bash", *asked],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    every, begun, setting = (line.split() for line in done.stdout.splitlines())
    assert sorted(every) == sorted(f"+hardware={name}" for name in (*names(), "auto"))
    assert sorted(begun) == ["+hardware=h20", "+hardware=h200"]
    assert setting == ["memfit.margin="]
    assert done.stderr == ""

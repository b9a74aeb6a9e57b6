"""The store of learned runs: many writers, and every way in which the file can be wrong."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_plugins.memfit.learning import store
from hydra_plugins.memfit.learning.store import Observation, StoreError
from hydra_plugins.memfit.learning.where import store_path

ROOT = Path(__file__).parents[1]
SEEN = Observation(
    run="/runs/1",
    kind="abc",
    alike={"framework": "verl 0.9"},
    memfit="0.1",
    outcome="ran",
    scope="reserved",
    predicted=100,
    observed=90,
    capacity=200,
)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    """Observations come back whole, by kind; the same run learned again replaces itself, another in its place does not."""
    file = tmp_path / "deep" / "store.sqlite3"
    assert store.read(file) == []
    other = replace(SEEN, run="/runs/2", kind="xyz", outcome="oom", phase="update_actor")
    for seen in (SEEN, other, replace(SEEN, observed=95)):
        store.add(file, seen)
    assert store.read(file, "abc") == [replace(SEEN, observed=95)]
    assert {seen.run for seen in store.read(file)} == {"/runs/1", "/runs/2"}
    died = replace(SEEN, outcome="oom", predicted=120)
    store.add(file, died)
    store.add(file, replace(SEEN, predicted=130))
    assert died in store.read(file, "abc") and len(store.read(file, "abc")) == 3
    assert (store.forget(file, "abc"), store.read(file)) == (3, [other])
    assert (store.forget(file, None), store.read(file)) == (1, [])


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MEMFIT_STORE": "/x/s.db", "HOME": "/h"}, "/x/s.db"),
        ({"XDG_DATA_HOME": "/data", "HOME": "/h"}, "/data/memfit/learned.sqlite3"),
        ({"HOME": "/h"}, "/h/.local/share/memfit/learned.sqlite3"),
    ],
)
def test_where_the_store_is(environ: dict[str, str], expected: str) -> None:
    """A variable of its own, the place for a user's data, the home directory: in this order."""
    assert str(store_path(environ)) == expected


def broken(file: Path, how: str) -> Path:
    """Make a store that cannot be used."""
    if how == "a folder is a file":
        (file.parent / "taken").write_text("")
        return file.parent / "taken" / "s.sqlite3"
    store.add(file, SEEN)
    if how == "no database":
        file.write_bytes(b"something else\n" * 100)
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "damaged":
        file.write_bytes(file.read_bytes()[:4096] + b"\xff" * 4096)
    else:
        change = "pragma user_version = 99" if how == "of another memfit" else "update runs set predicted = 0"
        with sqlite3.connect(file) as connection:
            connection.execute(change)
    return file


@pytest.mark.parametrize(
    "how", ["no database", "a folder", "damaged", "of another memfit", "impossible sizes", "a folder is a file"]
)
def test_a_broken_store_is_one_clear_error(how: str, tmp_path: Path) -> None:
    """Whatever is wrong with the file, the message names it and the ways out."""
    file = broken(tmp_path / "s.sqlite3", how)
    with pytest.raises(StoreError, match="MEMFIT_STORE=FILE") as error:
        assert store.read(file) or how == "a folder is a file"
        store.add(file, SEEN)
    assert str(file) in str(error.value)


WRITER = """
import sys
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, "tests")
from hydra_plugins.memfit.learning import store
from test_learning_store import SEEN
for number in range(5):
    store.add(Path(sys.argv[1]), replace(SEEN, run=f"/runs/{sys.argv[2]}/{number}"))
try:
    assert len(store.read(Path(sys.argv[1]), "abc")) >= 5
except store.StoreError as error:
    assert "locked" in str(error), error
"""


def write_at_once(file: Path, processes: int) -> list[tuple[int, str]]:
    """Start writers at the same time; return exit status and stderr of each."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(number)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    return [(writer.wait(timeout=300), writer.communicate()[1]) for writer in started]


@pytest.mark.slow
def test_many_processes_write_at_once(tmp_path: Path) -> None:
    """32 writers of five runs each: nothing is lost and nobody fails; a reader among them may give up waiting, no more."""
    file = tmp_path / "s.sqlite3"
    assert write_at_once(file, 32) == [(0, "")] * 32
    assert len(store.read(file, "abc")) == 160

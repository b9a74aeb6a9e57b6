"""What was observed, in one SQLite file of the user: many processes may write, and nothing depends on it being there.

It keeps SQLite's rollback journal: a write-ahead log needs memory that processes share, which home directories on a
network do not have, and a folder that readers may write to.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.learning.where import VARIABLE

SCHEMA = 1
_WRITE_TIMEOUT_S = 30.0
_READ_TIMEOUT_S = 5.0
"""A plan waits so long for a writer at most, and then does without."""
_MAKE = """
create table if not exists runs (
    run text not null, kind text not null, alike text not null, memfit text not null, outcome text not null,
    scope text not null, phase text not null, predicted integer not null, observed integer not null,
    capacity integer not null, learned_on text not null default (datetime('now')),
    primary key (run, kind, outcome, phase, predicted)
)
"""
_FIELDS = ("run", "kind", "alike", "memfit", "outcome", "scope", "phase", "predicted", "observed", "capacity")


class StoreError(MemfitError):
    """The store cannot be read or written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one run showed. Sizes are bytes of one device."""

    run: str
    """Where the run was read. The same one, with the same prediction, replaces itself; another one in that place does not."""
    kind: str
    alike: Mapping[str, str]
    """The kind in words (`kind.kind_of`)."""
    memfit: str
    """The version whose formulas predicted."""
    outcome: str
    """``ran`` or ``oom``."""
    scope: str
    phase: str = ""
    """Where it ran out of memory; empty where that is not known."""
    predicted: int
    observed: int
    """The peak; of a run that died, the least that it needed (0: not known)."""
    capacity: int

    @property
    def ratio(self) -> float:
        """Observed by predicted bytes."""
        return self.observed / self.predicted


def add(file: Path, observation: Observation) -> None:
    """Keep an observation; raises `StoreError`."""
    values = {name: getattr(observation, name) for name in _FIELDS}
    values["alike"] = json.dumps(dict(observation.alike))
    places = ", ".join(f":{name}" for name in _FIELDS)
    with _reported(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _open(str(file), timeout=_WRITE_TIMEOUT_S) as connection, connection:
            connection.execute("begin immediate")
            _check_schema(connection)
            connection.execute(_MAKE)
            connection.execute(f"pragma user_version = {SCHEMA}")
            connection.execute(f"insert or replace into runs ({', '.join(_FIELDS)}) values ({places})", values)


def read(file: Path, kind: str | None = None) -> list[Observation]:
    """Return the observations of a kind, or all, oldest first; raises `StoreError`. No file: none."""
    if not file.exists():
        return []
    with _reported(file), _open(f"{file.resolve().as_uri()}?mode=ro", timeout=_READ_TIMEOUT_S) as connection:
        if not _check_schema(connection):
            return []
        where = "" if kind is None else " where kind = ?"
        order = f"select {', '.join(_FIELDS)} from runs{where} order by learned_on, run"
        return [_observation(row) for row in connection.execute(order, () if kind is None else (kind,))]


def forget(file: Path, kind: str | None) -> int:
    """Delete the observations of a kind, or all; return how many there were. Raises `StoreError`."""
    if not file.exists():
        return 0
    with _reported(file), _open(str(file), timeout=_WRITE_TIMEOUT_S) as connection, connection:
        if not _check_schema(connection):
            return 0
        if kind is None:
            return connection.execute("delete from runs").rowcount
        return connection.execute("delete from runs where kind = ?", (kind,)).rowcount


def _observation(row: tuple[object, ...]) -> Observation:
    values = dict(zip(_FIELDS, row, strict=True))
    values["alike"] = json.loads(str(values["alike"]))
    observation = Observation(**values)  # type: ignore[arg-type]
    if observation.predicted <= 0 or observation.observed < 0 or observation.capacity <= 0:
        raise ValueError(f"the observation of {observation.run} has impossible sizes")
    return observation


def _check_schema(connection: sqlite3.Connection) -> bool:
    """Return whether there is a table; raises `StoreError` for one of another memfit."""
    found = connection.execute("pragma user_version").fetchone()[0]
    if found not in (0, SCHEMA):
        raise StoreError(f"it has the schema {found}, and this memfit reads {SCHEMA}")
    return bool(found)


@contextmanager
def _open(name: str, *, timeout: float) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(name, timeout=timeout, uri=name.startswith("file:"), isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError, StoreError) as error:
        raise StoreError(
            f"the store of learned runs {file} cannot be used: {error}. Name another one with {VARIABLE}=FILE, delete it, or "
            "plan without it: memfit.learned=false."
        ) from None

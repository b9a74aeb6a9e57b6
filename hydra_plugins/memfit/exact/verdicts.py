"""The compiler's verdicts, remembered: a program and the versions of its compiler have one verdict for ever."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hydra_plugins.memfit.base.files import cache_dir, write_whole
from hydra_plugins.memfit.exact import compiler
from hydra_plugins.memfit.exact.compiler import CompileFailed, Progress, Verdict
from hydra_plugins.memfit.exact.spec import Program

VARIABLE = "MEMFIT_TPU_CACHE"
_failed: dict[str, CompileFailed] = {}


def folder(environ: Mapping[str, str]) -> Path:
    """Return where verdicts are kept: ``$MEMFIT_TPU_CACHE``, else ``$XDG_CACHE_HOME/memfit/tpu``, else ``~/.cache/memfit/tpu``."""
    return Path(environ[VARIABLE]) if environ.get(VARIABLE) else cache_dir(environ) / "tpu"


def ask(program: Program, *, environ: Mapping[str, str], progress: Progress = lambda _: None) -> Verdict:
    """Return the verdict, from the cache when this compiler gave it before; raises as `compiler.ask` does."""
    digest = program.digest(compiler.versions())
    path = folder(environ) / f"{digest}.json"
    known = _load(path)
    if known is None:
        known = _asked(program, digest, progress)
        _store(path, program, known)
    return known


def _asked(program: Program, digest: str, progress: Progress) -> Verdict:
    """Ask the compiler; what failed once in this process is not tried again by the next step of a search."""
    if digest in _failed:
        raise _failed[digest]
    try:
        return compiler.ask(program, progress=progress)
    except CompileFailed as error:
        _failed[digest] = error
        raise


def _load(path: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(path.read_text())["verdict"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another version of memfit: ask again
        return None


def _store(path: Path, program: Program, verdict: Verdict) -> None:
    """Write whole or not at all: several processes of one launch may ask at the same time."""
    text = json.dumps({"program": asdict(program), "verdict": asdict(verdict)}, indent=1)
    with contextlib.suppress(OSError):  # a read-only home costs the next launch its minutes, and nothing else
        write_whole(path, text.encode())

"""Compiles a program for a TPU slice on a machine without one, and stops as soon as the question of memory is settled.

The compiler settles it at buffer assignment, long before code generation, which needs many times the memory. So the
child process dumps its assignments, and is ended once one fits; a program that does not fit is left to the end, because
the compiler tries again with more rematerialisation before it refuses.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.base.units import MIB, gib
from hydra_plugins.memfit.exact import assignment
from hydra_plugins.memfit.exact.assignment import Assignment
from hydra_plugins.memfit.exact.spec import Program

Progress = Callable[[str], None]
OVERLAY_BYTES = 160 * MIB
"""What joins the assignment in the compiler's last check (code overlays, scoped memory); closer to the limit than this, wait."""
_POLL_S = 1.0
_QUIET_S = 3.0
"""A dump that has not grown for this long is worth a look."""


class CompilerMissing(MemfitError):
    """jax or libtpu is not installed."""


class CompileFailed(MemfitError):
    """The compile ended without a verdict: a crash, a time-out, or too much memory used on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the compiler says of one program. Sizes are bytes of one device."""

    fits: bool
    used_bytes: int
    """In the assignment that decided; on a refusal, what the compiler reports."""
    natural_bytes: int
    """In the first assignment, before the compiler squeezed anything to fit; 0 when there was none."""
    argument_bytes: int
    capacity_bytes: int
    excess_bytes: int = 0
    compiler: str
    """``jax 0.8.2, libtpu 0.0.32``."""
    seconds: int = 0


def versions() -> str:
    """Return the versions that decide a verdict; raises `CompilerMissing` naming the extra to install."""
    try:
        found = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    except importlib.metadata.PackageNotFoundError as error:
        raise CompilerMissing(
            f"asking the TPU compiler needs jax and libtpu, and {error.name} is not installed. Install them with "
            "pip install '.[tpu]' in a clone of memfit (CPU is enough, no TPU is touched), or leave out --compile and memfit.exact."
        ) from None
    return ", ".join(found)


@dataclass(kw_only=True)
class _Watch:
    """One running child: where it dumps, and what its dumps have said so far."""

    process: subprocess.Popen[str]
    folder: Path
    program: Program
    seen: dict[tuple[str, int], Assignment] = field(default_factory=dict)

    def look(self) -> Assignment | None:
        """Return the newest complete assignment."""
        for path in sorted(self.folder.glob("*buffer-assignment.txt"), key=lambda p: p.stat().st_mtime_ns):
            stamp = (path.name, path.stat().st_size)
            if "jit_" in path.name and stamp not in self.seen and time.time() - path.stat().st_mtime > _QUIET_S:
                with path.open() as lines:
                    found = assignment.read(lines)
                if found is not None:
                    self.seen[stamp] = found
        return self.latest

    @property
    def latest(self) -> Assignment | None:
        """The last assignment that was read."""
        return next(reversed(self.seen.values()), None)

    @property
    def first(self) -> Assignment:
        """The assignment before any squeezing; empty when there was none."""
        return next(iter(self.seen.values()), Assignment())

    def settled(self) -> bool:
        """Whether an assignment fits with room for what joins it later."""
        found = self.look()
        return found is not None and found.used_bytes + OVERLAY_BYTES <= self.program.slice.capacity_bytes


def ask(
    program: Program, *, timeout_s: float = 1800, max_rss_bytes: int = 12 << 30, progress: Progress = lambda _: None
) -> Verdict:
    """Compile ``program`` in a child process and return the verdict.

    Raises `CompilerMissing`, or `CompileFailed` when the child crashes, runs longer than ``timeout_s`` or holds more
    than ``max_rss_bytes`` of host memory. One call at a time: a compile takes 1-3 CPU-minutes and 1-3 GB.
    """
    compiler = versions()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="memfit-tpu-") as folder:
        watch = _Watch(process=_start(program, Path(folder)), folder=Path(folder), program=program)
        try:
            _wait(watch, started + timeout_s, max_rss_bytes, progress)
        finally:
            _end(watch.process)
        output = (Path(folder) / "child.log").read_text(errors="replace")
        watch.look()
        return _verdict(watch, output, compiler, round(time.monotonic() - started))


def _start(program: Program, folder: Path) -> subprocess.Popen[str]:
    generation = program.slice.topology.partition(":")[0]
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{generation}-{program.slice.devices}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text=true",
    }
    root = str(Path(__file__).resolve().parents[3])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    (folder / "program.json").write_text(program.as_json())
    with (folder / "program.json").open() as stdin, (folder / "child.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hydra_plugins.memfit.exact.child"],
            stdin=stdin, stdout=log, stderr=subprocess.STDOUT, env=environ, text=True, start_new_session=True,
        )  # fmt: skip


def _wait(watch: _Watch, deadline: float, max_rss_bytes: int, progress: Progress) -> None:
    began = time.monotonic()
    while watch.process.poll() is None and not watch.settled():
        now = time.monotonic()
        if now > deadline:
            raise CompileFailed(f"the TPU compile gave no verdict in {round(now - began)} s; the closed form stands")
        if (held := _rss_bytes(watch.process.pid)) > max_rss_bytes:
            raise CompileFailed(
                f"the TPU compile took {gib(held)} of host memory and was ended; the closed form stands"
            )
        progress(_stage(watch, now - began))
        time.sleep(_POLL_S)


def _stage(watch: _Watch, seconds: float) -> str:
    found = watch.latest
    what = f"first assignment needs {gib(found.used_bytes)}, squeezing" if found else "compiling"
    return f"{what} ({round(seconds)} s)"


def _rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found.group(1)) << 10 if found else 0
    return 0


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(watch: _Watch, output: str, compiler: str, seconds: int) -> Verdict:
    capacity, natural, latest = watch.program.slice.capacity_bytes, watch.first.used_bytes, watch.latest
    failed = re.search(r"^FAILED (.*)", output, re.M | re.S)
    common = {"natural_bytes": natural, "compiler": compiler, "seconds": seconds}
    if failed:
        return _refused(failed.group(1), watch.first, capacity, common)
    if latest is None and (stats := re.search(r"^STATS (.*)$", output, re.M)):
        latest = _from_stats(json.loads(stats.group(1)))
    if latest is None:
        raise CompileFailed(f"the TPU compile ended without a verdict: {output.strip()[-400:] or 'no output'}")
    return Verdict(
        fits=True,
        used_bytes=latest.used_bytes,
        argument_bytes=latest.argument_bytes,
        capacity_bytes=capacity,
        **common,  # type: ignore[arg-type]
    )


def _from_stats(stats: dict[str, int]) -> Assignment:
    return Assignment(
        argument_bytes=stats["argument_size_in_bytes"],
        temp_bytes=stats["temp_size_in_bytes"],
        other_bytes=stats["output_size_in_bytes"] - stats["alias_size_in_bytes"],
    )


def _refused(message: str, first: Assignment, capacity: int, common: dict[str, object]) -> Verdict:
    numbers = assignment.refusal(message)
    if numbers is None:
        raise CompileFailed(f"the TPU compiler failed: {message.strip()[:400]}")
    # A program that exceeds HBM by itself is reported with no arguments: add them, or the need is understated.
    arguments = numbers.get("argument_bytes", 0)
    used = numbers.get("used_bytes", capacity) + (0 if arguments else first.argument_bytes)
    limit = numbers.get("capacity_bytes", capacity)
    return Verdict(
        fits=False,
        used_bytes=used,
        argument_bytes=arguments or first.argument_bytes,
        capacity_bytes=limit,
        excess_bytes=max(1, used - limit),
        **common,  # type: ignore[arg-type]
    )

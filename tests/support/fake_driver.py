"""A driver library for the tests: compiles ``nvml_stub.c`` once and plays scenarios through the real NVML bindings."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub") / "nvml_stub.c"


@cache
def _scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="memfit-nvml-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def _library(old: bool) -> Path:
    """Return the directory of a freshly compiled libnvidia-ml.so.1; ``old`` lacks what came with driver 510."""
    directory = _scratch() / ("old" if old else "new")
    directory.mkdir()
    flags = ["-DOLD_DRIVER"] if old else []
    target = directory / "libnvidia-ml.so.1"
    command = [
        "gcc",
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        *flags,
        "-o",
        str(target),
        str(SOURCE),
    ]
    subprocess.run(command, check=True, timeout=60)
    return directory


@dataclass(kw_only=True)
class Gpu:
    """One GPU or MIG slice of a scenario; sizes in MiB as nvidia-smi prints them."""

    name: str
    total: int
    reserved: int = 0
    used: int = 0
    uuid: str = ""
    cc: str = "9.0"
    extra: tuple[str, ...] = ()
    slices: tuple[Gpu, ...] = ()

    def lines(self, number: int, opening: str = "gpu") -> list[str]:
        """Return the scenario's lines of this device and of its slices."""
        uuid = self.uuid or f"GPU-{number}0000000-aaaa-bbbb-cccc-{number:012d}"
        values = {"name": self.name, "uuid": uuid, "total": self.total, "reserved": self.reserved, "used": self.used}
        own = [opening, *(f"{key}={value}" for key, value in values.items()), f"cc={self.cc}", *self.extra]
        if self.slices:
            own.append("mig=1")
        return own + [line for place, part in enumerate(self.slices) for line in part.lines(place, "slice")]


@dataclass(kw_only=True)
class Driver:
    """A scenario: its GPUs in the driver's order, and lines that hold for all of them."""

    gpus: tuple[Gpu, ...] = ()
    extra: tuple[str, ...] = ()
    old: bool = False
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = [*self.extra, *(line for number, gpu in enumerate(self.gpus) for line in gpu.lines(number))]

    def environ(self, directory: Path, **variables: str) -> dict[str, str]:
        """Write the scenario below ``directory`` and return the environment in which the bindings play it."""
        scenario = directory / "scenario.txt"
        scenario.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "MEMFIT_", "TPU_"))}
        return {**kept, "LD_LIBRARY_PATH": str(_library(self.old)), "NVML_STUB": str(scenario), **variables}


H100 = Gpu(name="NVIDIA H100 80GB HBM3", total=81559, reserved=551, extra=("ecc=1", "mig=0"))
H200 = Gpu(name="NVIDIA H200", total=143771, reserved=700, extra=("ecc=1", "mig=0"))
A40 = Gpu(name="NVIDIA A40", total=46068, reserved=573, cc="8.6", extra=("ecc=1",))
RTX4090 = Gpu(name="NVIDIA GeForce RTX 4090", total=24564, reserved=354, cc="8.9")

"""Every NVML error code at every call, hangs and crashes: an answer or a clear error, in bounded time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected
from hydra_plugins.memfit.hardware import nvml
from support.fake_driver import H100, Driver, Gpu

SLICE = Gpu(name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", total=40448, reserved=20, uuid="MIG-1")
CUT = replace(H100, extra=("ecc=1",), slices=(SLICE,))
CODES = sorted({value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")})
NEEDED = ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetName"]
WELCOME = [
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetEccMode",
]
WELCOME += ["nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMemoryInfo_v2"]
OF_SLICES = ["nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex"]
EVERY = [*NEEDED, *WELCOME, *OF_SLICES, "nvmlDeviceGetMemoryInfo"]
OFF = {3: "NVML_ERROR_NOT_SUPPORTED", 13: "NVML_ERROR_FUNCTION_NOT_FOUND"}


def failing(function: str, code: int) -> list[str]:
    """Return the scenario lines that let this call of a whole GPU fail with this code."""
    lines = [f"fail={function}:{code}"]
    if function == "nvmlDeviceGetMemoryInfo":  # only asked where the second version fails
        lines.append(f"fail=nvmlDeviceGetMemoryInfo_v2:{code}")
    return lines


def children() -> list[str]:
    """Return the command lines of this process's children, the dead but not collected ones in brackets."""
    command = ["ps", "-ww", "-o", "args=", "--ppid", str(os.getpid())]
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()


def check(function: str, code: int, directory: Path) -> None:
    """Assert that a failing call ends in an error with call and code, or in an answer where the call is dispensable."""
    environ = Driver(gpus=(H100,), extra=tuple(failing(function, code))).environ(directory)
    dispensable = function in WELCOME or function in OF_SLICES[1:] or (function == OF_SLICES[0] and code in OFF)
    if dispensable:
        assert nvml.detect(environ).name == "h100"
        return
    with pytest.raises(HardwareNotDetected) as caught:
        nvml.detect(environ)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("function", "code"), [*((name, 999) for name in EVERY), ("nvmlDeviceGetMigMode", 3)])
def test_a_failing_call(function: str, code: int, tmp_path: Path) -> None:
    """Calls that are needed fail detection with a reason; the others do not stop it."""
    check(function, code, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("function", EVERY)
def test_every_code_at_every_call(function: str, code: int, tmp_path: Path) -> None:
    """The whole table of codes, the same rule."""
    check(function, code, tmp_path)


@pytest.mark.parametrize("function", OF_SLICES[1:])
def test_a_failing_call_of_a_slice(function: str, tmp_path: Path) -> None:
    """A GPU whose slices cannot be read is not taken whole."""
    with pytest.raises(
        HardwareNotDetected, match=f"GPU 0 is visible and cannot be read: .*{function}: NVML_ERROR_UNKNOWN"
    ):
        nvml.detect(Driver(gpus=(CUT,), extra=(f"fail={function}:999",)).environ(tmp_path))


MESSAGES = [
    (9, "NVML: the NVIDIA kernel driver is not loaded (nvmlInit: NVML_ERROR_DRIVER_NOT_LOADED)."),
    (18, "kernel module differ in version: reboot (nvmlInit: NVML_ERROR_LIB_RM_VERSION_MISMATCH)."),
    (999, "(nvmlInit: NVML_ERROR_UNKNOWN)."),
    (77, "(nvmlInit: code 77)."),
]


@pytest.mark.parametrize(("code", "message"), MESSAGES)
def test_the_reason_is_in_words(code: int, message: str, tmp_path: Path) -> None:
    """Common causes are said in words, with the call and the name of the code; unknown codes by number."""
    with pytest.raises(HardwareNotDetected) as caught:
        nvml.detect(Driver(gpus=(H100,), extra=(f"fail=nvmlInitWithFlags:{code}",)).environ(tmp_path))
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetMemoryInfo_v2"])
def test_a_call_that_hangs_is_given_up(function: str, tmp_path: Path) -> None:
    """The wait is bounded, the error says how to wait longer, and no process stays behind."""
    environ = Driver(gpus=(H100,), extra=(f"hang={function}",)).environ(tmp_path, MEMFIT_NVML_TIMEOUT="0.7")
    begin = time.monotonic()
    with pytest.raises(HardwareNotDetected, match=r"did not answer within 0.7 s; MEMFIT_NVML_TIMEOUT="):
        nvml.detect(environ)
    assert time.monotonic() - begin < 5
    assert not [child for child in children() if "nvml_probe.py" in child]


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetName"])
def test_a_crashing_driver_does_not_take_the_launch_along(function: str, tmp_path: Path) -> None:
    """A segmentation fault inside the library is an error like any other."""
    with pytest.raises(HardwareNotDetected, match=r"ended the process that asked it \(signal 11\)"):
        nvml.detect(Driver(gpus=(H100,), extra=(f"crash={function}",)).environ(tmp_path))


@pytest.mark.parametrize(
    ("executable", "message"), [("", "does not know its own"), ("/nowhere/python", "No such file")]
)
def test_a_python_that_cannot_start_another(
    executable: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded interpreter, or one whose file is gone, is told apart from a host without a GPU."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(HardwareNotDetected, match=message):
        nvml.detect(Driver(gpus=(H100,)).environ(tmp_path))


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_timeout_must_be_a_sensible_number(text: str, tmp_path: Path) -> None:
    """A wait that is no number of seconds is refused before anything is started."""
    with pytest.raises(ConfigError, match="MEMFIT_NVML_TIMEOUT"):
        nvml.detect(Driver(gpus=(H100,)).environ(tmp_path, MEMFIT_NVML_TIMEOUT=text))


def test_detection_leaves_no_driver_in_the_process(tmp_path: Path) -> None:
    """The launch itself maps no NVIDIA library, opens no device and imports no bindings, numpy or torch."""
    code = (
        "import os, sys; from hydra_plugins.memfit.hardware import nvml; print(nvml.detect(os.environ).name);"
        "print('libnvidia' in open('/proc/self/maps').read(), sorted({'pynvml', 'numpy', 'torch'} & set(sys.modules)))"
    )
    environ = Driver(gpus=(H100,)).environ(tmp_path, PYTHONPATH=":".join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("h100\nFalse []\n", "")

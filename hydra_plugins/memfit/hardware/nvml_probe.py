"""Read NVML and print it as one line of JSON. Run as a program, in a process of its own: ``nvml`` says why.

    python -I -S nvml_probe.py DIRECTORY_OF_PYNVML PID_OF_THE_CALLER

Decides nothing: a call that fails is written down with its code, and the caller judges. Imports nothing of memfit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

MIG_IS_OFF = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND")


class Nvml:
    """The bindings, with each failed call as a record instead of an exception."""

    def __init__(self, pynvml: Any) -> None:
        self.lib = pynvml
        self.codes = {
            getattr(pynvml, name): name
            for name in dir(pynvml)
            if name.startswith("NVML_ERROR_") and isinstance(getattr(pynvml, name), int)
        }

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the bindings; raises `Failed`."""
        try:
            return getattr(self.lib, name)(*args, **kwargs)
        except self.lib.NVMLError as error:
            code = getattr(error, "value", None)
            raise Failed(name, self.codes.get(code, f"code {code}"), self._text(error)) from error
        except Exception as error:
            raise Failed(name, type(error).__name__, str(error)) from error

    def maybe(self, name: str, *args: Any) -> Any:
        """Call a function whose answer is welcome and not needed; ``None`` where it fails."""
        try:
            return self.call(name, *args)
        except Failed:
            return None

    def _text(self, error: Exception) -> str:
        try:
            return str(error)
        except Exception:  # the binding asks the library for the text, which may fail as well
            return "no description"


class Failed(Exception):
    """One call that failed: its name, the name of its code, and the library's words."""

    def __init__(self, call: str, code: str, text: str) -> None:
        super().__init__(call, code, text)
        self.record = {"call": call, "code": code, "text": text}


def memory(nvml: Nvml, handle: Any) -> dict[str, int | None]:
    """Return total, reserved and used bytes; ``reserved`` is ``None`` where only the call's first version exists."""
    version = getattr(nvml.lib, "nvmlMemory_v2", None)
    try:
        if version is not None:
            info = nvml.call("nvmlDeviceGetMemoryInfo", handle, version=version)
            return {"total": info.total, "reserved": info.reserved, "used": info.used}
    except Failed:
        pass  # drivers before 510 know the first version alone; where both fail, the second failure is reported
    info = nvml.call("nvmlDeviceGetMemoryInfo", handle)
    return {"total": info.total, "reserved": None, "used": info.used}


def common(nvml: Nvml, handle: Any, pid: int) -> dict[str, Any]:
    """Return what a GPU and a MIG slice both say."""
    capability = nvml.maybe("nvmlDeviceGetCudaComputeCapability", handle)
    processes = nvml.maybe("nvmlDeviceGetComputeRunningProcesses", handle) or []
    return {
        "uuid": nvml.maybe("nvmlDeviceGetUUID", handle),
        "product": nvml.call("nvmlDeviceGetName", handle),
        "memory": memory(nvml, handle),
        "compute_capability": capability and f"{capability[0]}.{capability[1]}",
        "own": sum(entry.usedGpuMemory or 0 for entry in processes if entry.pid == pid),
    }


def mig_enabled(nvml: Nvml, handle: Any) -> bool:
    """Return whether the GPU is cut into slices; a GPU that cannot be is not."""
    try:
        return bool(nvml.call("nvmlDeviceGetMigMode", handle)[0])
    except Failed as failed:
        if failed.record["code"] in MIG_IS_OFF:
            return False
        raise


def slices(nvml: Nvml, handle: Any, pid: int) -> Iterator[dict[str, Any]]:
    """Yield the MIG devices of a GPU in the driver's order."""
    for index in range(nvml.call("nvmlDeviceGetMaxMigDeviceCount", handle)):
        try:
            child = nvml.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        except Failed as failed:
            if failed.record["code"] == "NVML_ERROR_NOT_FOUND":
                continue
            raise
        instance = nvml.maybe("nvmlDeviceGetGpuInstanceId", child), nvml.maybe("nvmlDeviceGetComputeInstanceId", child)
        yield {**common(nvml, child, pid), "instance": instance}


def board(nvml: Nvml, index: int, pid: int) -> dict[str, Any]:
    """Return the reading of one GPU, or the failure that kept it from being read.

    Of a GPU that is cut into slices only the slices are read: a container may hold one of them without the whole.
    """
    found: dict[str, Any] = {"index": index, "uuid": None, "failed": None, "mig": False, "slices": []}
    try:
        handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
        found["uuid"] = nvml.maybe("nvmlDeviceGetUUID", handle)
        found["product"] = nvml.maybe("nvmlDeviceGetName", handle)
        found["mig"] = mig_enabled(nvml, handle)
        ecc = nvml.maybe("nvmlDeviceGetEccMode", handle)
        found["ecc"] = bool(ecc[0]) if ecc else None
        if found["mig"]:
            found["slices"] = list(slices(nvml, handle, pid))
        else:
            found.update(common(nvml, handle, pid))
    except Failed as failed:
        found["failed"] = failed.record
    return found


def probe(load: Callable[[], Any], pid: int) -> dict[str, Any]:
    """Return the whole reading, or the first failure that concerns every GPU."""
    try:
        nvml = Nvml(load())
    except Exception as error:
        return {"failed": {"call": "import pynvml", "code": type(error).__name__, "text": str(error)}}
    try:
        nvml.call("nvmlInit")
        count = nvml.call("nvmlDeviceGetCount")
        driver = nvml.maybe("nvmlSystemGetDriverVersion")
        return {"failed": None, "driver": driver, "boards": [board(nvml, index, pid) for index in range(count)]}
    except Failed as failed:
        return {"failed": failed.record}


def _bindings() -> Any:
    import pynvml

    return pynvml


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print("\n" + json.dumps(probe(_bindings, int(sys.argv[2]))), flush=True)

"""Detection of NVIDIA GPUs through nvidia-ml-py, without a CUDA context.

NVML runs in a short-lived process of its own. A call into a broken driver can hang or crash, and a thread that is
stuck in C can neither be stopped nor left behind safely: the launch would wait for it at exit, or die with it. A
process can be killed, and where even that has to wait for the kernel, it is abandoned. It costs one bare interpreter
start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.hardware import capacity, catalog
from hydra_plugins.memfit.hardware.spec import Device, Hardware
from hydra_plugins.memfit.hardware.visibility import Board, Reading, Selection, select

TIMEOUT_VARIABLE = "MEMFIT_NVML_TIMEOUT"
DEFAULT_TIMEOUT_S = 10.0
_REASONS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "no NVIDIA driver library (libnvidia-ml.so.1) on this host",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA kernel driver is not loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the driver's library and kernel module differ in version: reboot",
    "NVML_ERROR_NO_PERMISSION": "this process may not talk to the NVIDIA driver",
    "NVML_ERROR_GPU_IS_LOST": "the GPU has fallen off the bus",
    "NVML_ERROR_RESET_REQUIRED": "the GPU needs a reset",
}


def detect(environ: Mapping[str, str]) -> Hardware:
    """Return the GPUs that a CUDA process with this environment would see; raises `HardwareNotDetected`.

    Several GPUs give one answer: the smallest capacity, and the most that others hold on any of them.
    """
    return from_report(report(environ), environ)


def from_report(report: Mapping[str, Any], environ: Mapping[str, str]) -> Hardware:
    """Return the same from what `report` gave, here or on another host; ``environ`` is that of the process that will train."""
    if report["failed"] is not None:
        raise HardwareNotDetected(f"NVML: {_words(report['failed'])}.")
    selection = select([_board(entry) for entry in report["boards"]], environ)
    return _hardware(selection, report["driver"])


def report(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what this host's driver says, plain, for JSON; raises `HardwareNotDetected` where it says nothing in time."""
    timeout = _timeout(environ)
    child = _start(_command(), environ)
    try:
        output, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _abandon(child)
        raise HardwareNotDetected(
            f"NVML did not answer within {timeout:g} s; {TIMEOUT_VARIABLE}=<seconds> waits longer. "
            "Without persistence mode each GPU takes a second or two; a driver that hangs shows in nvidia-smi as well."
        ) from None
    return _parsed(output, child.returncode)


def _start(command: list[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # Not a `with` block and no run(): both wait without limit for a child that the kernel does not let die.
    silent = subprocess.DEVNULL
    try:
        return subprocess.Popen(command, env=dict(environ), stdin=silent, stdout=subprocess.PIPE, stderr=silent)
    except OSError as error:
        raise HardwareNotDetected(f"the process that reads NVML could not be started: {error}.") from error


def _command() -> list[str]:
    try:
        bindings = importlib.util.find_spec("pynvml")
    except ValueError:  # something put a module of that name in place that has no origin
        bindings = None
    if bindings is None or bindings.origin is None:
        raise HardwareNotDetected("the NVML bindings are not installed: pip install nvidia-ml-py.")
    if not sys.executable:
        raise HardwareNotDetected("this Python does not know its own executable, which NVML is read with.")
    origin = Path(bindings.origin)
    directory = origin.parents[1] if bindings.submodule_search_locations else origin.parent
    # -I -S: the child needs the standard library and one file, not the user's site and its start-up hooks.
    probe = Path(__file__).with_name("nvml_probe.py")
    return [sys.executable, "-I", "-S", str(probe), str(directory), str(os.getpid())]


def _abandon(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    if child.stdout is not None:
        child.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it ends when the driver lets it
        child.wait(timeout=0.5)


def _parsed(output: bytes, returncode: int) -> dict[str, Any]:
    lines = output.decode(errors="replace").splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except ValueError:
        report = None
    if returncode != 0 or not isinstance(report, dict):
        how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        raise HardwareNotDetected(f"NVML: the driver library ended the process that asked it ({how}).")
    return report


def _timeout(environ: Mapping[str, str]) -> float:
    text = environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text.strip() else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text!r} is not a number of seconds above 0 and up to 3600, e.g. 10.")
    return seconds


def _words(failed: Mapping[str, str]) -> str:
    reason = _REASONS.get(failed["code"], failed["text"])
    return f"{reason} ({failed['call']}: {failed['code']})"


def _board(entry: Mapping[str, Any]) -> Board:
    failed = entry["failed"]
    forbidden = failed is not None and failed["code"] == "NVML_ERROR_NO_PERMISSION"
    return Board(
        index=entry["index"],
        uuid=entry["uuid"],
        whole=None if failed is not None or entry["mig"] else _reading(entry, entry),
        slices=tuple(_reading(part, entry) for part in entry["slices"]),
        mig=entry["mig"],
        failure=None if failed is None else _failure(failed),
        allowed=not forbidden,
    )


def _failure(failed: Mapping[str, str]) -> str:
    if failed["call"] == "nvmlDeviceGetMemoryInfo" and failed["code"] == "NVML_ERROR_NOT_SUPPORTED":
        return (
            "its memory is the host's own (GB10, Jetson), which memfit does not model: no number says how much of it "
            "the device may take (nvmlDeviceGetMemoryInfo: NVML_ERROR_NOT_SUPPORTED)"
        )
    return _words(failed)


def _reading(part: Mapping[str, Any], board: Mapping[str, Any]) -> Reading:
    mig = part is not board
    product, instance = part["product"], part.get("instance") or (None, None)
    if mig and "MIG" not in product:
        product = f"{product} MIG slice"
    return Reading(
        index=board["index"],
        uuid=part["uuid"],
        product=product,
        total_bytes=part["memory"]["total"],
        reserved_bytes=part["memory"]["reserved"],
        used_bytes=part["memory"]["used"],
        own_bytes=part["own"],
        compute_capability=part["compute_capability"],
        ecc=board["ecc"],
        mig=mig,
        mig_path=f"MIG-{board['uuid']}/{instance[0]}/{instance[1]}" if mig else None,
    )


def _facts(reading: Reading) -> catalog.Facts | None:
    name = None if reading.mig else catalog.by_product(reading.product)
    return None if name is None else catalog.facts(name)


def _device(reading: Reading) -> tuple[Device, tuple[str, ...]]:
    """Return the judged device and what a user should know about it."""
    facts = _facts(reading)
    found = capacity.usable(total_bytes=reading.total_bytes, reserved_bytes=reading.reserved_bytes, facts=facts)
    used = reading.used_bytes
    if reading.reserved_bytes is None:  # the first version of the call counts the driver's part as used
        used -= capacity.assumed_reserved_bytes(reading.total_bytes)
    device = Device(
        index=reading.index,
        uuid=reading.uuid,
        product=reading.product,
        total_bytes=reading.total_bytes,
        reserved_bytes=reading.reserved_bytes,
        usable_bytes=found.usable_bytes,
        held_bytes=max(0, used - reading.own_bytes),
        compute_capability=reading.compute_capability,
        ecc=reading.ecc,
        mig=reading.mig,
    )
    return device, tuple(_warnings(device, facts, found))


def _warnings(device: Device, facts: catalog.Facts | None, found: capacity.Usable) -> list[str]:
    said = []
    if found.contradicts_name and facts is not None:
        low, _ = facts.capacity_range_bytes
        ecc = ", ECC is off" if device.ecc is False else ""
        said.append(
            f"{device.product} offers {gib(device.usable_bytes)}, not the {gib(low)} of "
            f"conf/hardware/{facts.name}.yaml{ecc}: the driver's number counts"
        )
    if facts is None and not device.mig:
        said.append(f"no file in conf/hardware lists {device.product!r}: its bandwidth and FLOP/s are not known")
    if device.reserved_bytes is None:
        kept = capacity.assumed_reserved_bytes(device.total_bytes)
        said.append(f"this driver does not say how much it keeps: {gib(kept)} of {gib(device.total_bytes)} is assumed")
    return said


def _hardware(selection: Selection, driver: str | None) -> Hardware:
    judged = [_device(reading) for reading in selection.readings]
    devices = tuple(device for device, _ in judged)
    smallest = min(devices, key=lambda device: device.usable_bytes)
    _check_memory(smallest)
    name = None if smallest.mig else catalog.by_product(smallest.product)
    listed = None if name is None else catalog.load(name)
    said = (*selection.notes, *_mixed(devices), *(warning for _, warnings in judged for warning in warnings))
    return Hardware(
        name=name or smallest.product,
        product=smallest.product,
        kind="gpu",
        capacity_bytes=smallest.usable_bytes,
        held_bytes=max(device.held_bytes for device in devices),
        gpus_per_node=selection.count,
        nodes=None,
        host_memory_bytes_per_device=listed.host_memory_bytes_per_device if listed else None,
        memory_bandwidth_bytes_per_s=listed.memory_bandwidth_bytes_per_s if listed else None,
        bf16_dense_flops=listed.bf16_dense_flops if listed else None,
        compute_capability=smallest.compute_capability or (listed.compute_capability if listed else None),
        source=f"NVML, driver {driver or 'of unknown version'}",
        warnings=tuple(dict.fromkeys(said)),
        devices=devices,
    )


def _check_memory(device: Device) -> None:
    if device.usable_bytes <= 0:
        raise HardwareNotDetected(
            f"NVML: GPU {device.index} ({device.product}) reports a total of {device.total_bytes} bytes: not possible."
        )


def _mixed(devices: Sequence[Device]) -> list[str]:
    kinds = {(device.product, device.total_bytes): device.usable_bytes for device in devices}
    if len(kinds) < 2:
        return []
    listed = ", ".join(f"{product} with {gib(size)}" for (product, _), size in kinds.items())
    return [f"GPUs of several kinds: {listed}. The smallest counts for all"]

"""``hardware=<name>`` to `Hardware`: the only door that the rest of memfit uses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected, UnknownName
from hydra_plugins.memfit.hardware import catalog, host, nvml
from hydra_plugins.memfit.hardware.spec import Hardware

VARIABLE = "MEMFIT_HARDWARE"
TPU_MODULE = "hydra_plugins.memfit.hardware.tpu"
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
_TPU_FILES = ("accel*", "vfio/[0-9]*")


def resolve(name: str, *, environ: Mapping[str, str], root: Path = host.ROOT) -> Hardware:
    """Return the accelerator that ``name`` means in this environment.

    ``auto``: ``MEMFIT_HARDWARE`` if it is set, else the GPUs of this host, else its TPU. Any other name: the file in
    ``conf/hardware``. Raises `UnknownName` or `HardwareNotDetected`. Creates no CUDA context; safe in threads.
    """
    if name != catalog.AUTO:
        return catalog.load(name)
    answer = environ.get(VARIABLE, "").strip()
    return _from_variable(answer) if answer else _detect(environ, root)


def describe(hardware: Hardware) -> dict[str, Any]:
    """Return plain values for JSON, with each device's reading under ``devices``. Sizes are bytes."""
    plain = asdict(hardware)
    plain["warnings"] = list(hardware.warnings)
    plain["devices"] = [asdict(device) for device in hardware.devices]
    return plain


def _from_variable(answer: str) -> Hardware:
    if answer == catalog.AUTO:
        raise ConfigError(f"{VARIABLE}=auto says nothing: name what auto stands for, e.g. {VARIABLE}=h100.")
    try:
        found = catalog.load(answer)
    except UnknownName as error:
        raise UnknownName("hardware", answer, error.known, f"It was asked for by {VARIABLE}.") from None
    return replace(found, source=f"{VARIABLE}={answer}, {found.source}")


def _detect(environ: Mapping[str, str], root: Path) -> Hardware:
    try:
        found = nvml.detect(environ)
    except HardwareNotDetected as error:
        tpu = _tpu(environ, root)
        if tpu is None:
            raise HardwareNotDetected(f"hardware=auto found no accelerator: {error} {_fix()}") from error
        found = tpu
    if found.host_memory_bytes is not None:
        return found
    return replace(found, host_memory_bytes=host.host_memory_bytes(root))


def _fix() -> str:
    return (
        f"Say which one the launch will run on: +hardware=<name>, or {VARIABLE}=<name> in the environment. "
        f"Known: {', '.join(catalog.names())}."
    )


def _tpu(environ: Mapping[str, str], root: Path) -> Hardware | None:
    """Return the TPU of this host; asks only where a device file or a variable says that there may be one."""
    files = (path for pattern in _TPU_FILES for path in (root / "dev").glob(pattern))
    if not any(environ.get(key) for key in _TPU_VARIABLES) and next(files, None) is None:
        return None
    try:
        module = importlib.import_module(TPU_MODULE)
    except ModuleNotFoundError as error:
        if error.name != TPU_MODULE:
            raise
        return None
    found: Hardware | None = module.detect(environ, root=root)
    return found

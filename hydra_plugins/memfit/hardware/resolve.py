"""``hardware=<name>`` to `Hardware`: the only door that the rest of memfit uses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected, UnknownName
from hydra_plugins.memfit.base.units import GIB, gib
from hydra_plugins.memfit.hardware import catalog, host, nvml, ray_cluster, slurm
from hydra_plugins.memfit.hardware.spec import Hardware

VARIABLE = "MEMFIT_HARDWARE"
TPU_MODULE = "hydra_plugins.memfit.hardware.tpu"
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
_ENOUGH_SHM = GIB
"""Docker gives 64 MiB where nobody asks for more; a launch on one GPU without Ray gets by with some hundreds."""
_TPU_FILES = ("accel*", "vfio/[0-9]*")


def resolve(
    name: str, *, environ: Mapping[str, str], root: Path = host.ROOT, ray_address: str | None = None
) -> Hardware:
    """Return the accelerator that ``name`` means in this environment.

    ``auto``: ``MEMFIT_HARDWARE`` if it is set; else the Ray cluster that the launch names (``ray_address``, its config's, or
    ``RAY_ADDRESS``); else the GPUs of this host, or its TPU; else those of the Ray cluster or Slurm that it belongs to. Any
    other name: the file in ``conf/hardware``. Raises `UnknownName` or `HardwareNotDetected`. Creates no CUDA context; safe in
    threads.
    """
    if name != catalog.AUTO:
        return catalog.load(name)
    answer = environ.get(VARIABLE, "").strip()
    return _from_variable(answer) if answer else _detect(environ, root, ray_address)


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


def _detect(environ: Mapping[str, str], root: Path, ray_address: str | None) -> Hardware:
    named = ray_cluster.asked_for(environ, ray_address)
    here = partial(_local, environ, root)
    around = partial(_around, environ)
    ways = [partial(ray_cluster.detect, named, environ), here] if named else [here, around]
    reasons: list[str] = []
    for way in ways:
        try:
            found = way()
        except HardwareNotDetected as error:
            reasons.append(str(error))
            continue
        return replace(found, warnings=(*found.warnings, *(reasons if named else ())))
    raise HardwareNotDetected(f"hardware=auto found no accelerator: {' '.join(filter(None, reasons))} {_fix()}")


def _local(environ: Mapping[str, str], root: Path) -> Hardware:
    """Return the accelerator of this host."""
    try:
        found = nvml.detect(environ)
    except HardwareNotDetected:
        tpu = _tpu(environ, root)
        if tpu is None:
            raise
        found = tpu
    found = replace(found, warnings=(*found.warnings, *_shared_memory(root)))
    if found.host_memory_bytes is not None:
        return found
    return replace(found, host_memory_bytes=host.host_memory_bytes(root))


def _shared_memory(root: Path) -> list[str]:
    """Say where a container's /dev/shm is too small for NCCL, engine workers and Ray's object store."""
    size = host.shm_bytes(root)
    if size is None or size >= _ENOUGH_SHM:
        return []
    return [
        f"/dev/shm has {gib(size)}, which NCCL, the workers of an engine and Ray's object store share: "
        "docker run --shm-size=16g (or --ipc=host), in Kubernetes an emptyDir with medium Memory on /dev/shm"
    ]


def _around(environ: Mapping[str, str]) -> Hardware:
    """Return the accelerators of the cluster that this host, which has none, belongs to."""
    address = ray_cluster.running_here(environ)
    if address is not None:
        return ray_cluster.detect(address, environ)
    if slurm.is_here(environ):
        return slurm.detect(environ)
    raise HardwareNotDetected("")


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

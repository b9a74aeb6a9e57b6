"""Finds the TPU slice that this host belongs to: from its environment, else from the metadata server of the VM.

Nothing here opens a TPU (that would take it from the run). The metadata server is asked only on a host that has a
Google accelerator on its PCI bus or a TPU variable in its environment, with a short timeout: anywhere else the name
does not resolve, and a launch would wait for that.

Variables, as libtpu reads them: ``TPU_ACCELERATOR_TYPE`` (``v4-16``), ``TPU_CHIPS_PER_HOST_BOUNDS`` (``2,2,1``),
``TPU_HOST_BOUNDS`` (``1,1,2``), ``TPU_WORKER_HOSTNAMES`` (``10.0.0.2,10.0.0.3``), ``TPU_VISIBLE_CHIPS`` (``0,1``).
The metadata attribute ``tpu-env`` holds the same without the prefix, a line each.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.hardware.slices import CORES_PER_CHIP, SliceType, parse_slice
from hydra_plugins.memfit.hardware.spec import Hardware

METADATA_TIMEOUT_S = 1.0
GOOGLE_PCI_VENDOR = "0x1ae0"
GOOGLE_PCI_TPUS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""Device numbers of v3, v4, v5p, v5e, v6e and TPU7x chips. Source: jax 0.8.2, ``jax/_src/hardware_utils.py``."""
_PATH = "/computeMetadata/v1/instance/attributes/"
_HINTS = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_TOPOLOGY")


def parse_type(accelerator_type: str) -> SliceType:
    """Read an accelerator type; raises `HardwareNotDetected` for a generation that memfit has no facts of."""
    found = parse_slice(accelerator_type)
    if found is None:
        raise HardwareNotDetected(
            f"TPU accelerator type {accelerator_type!r} is not one that memfit knows ({', '.join(CORES_PER_CHIP)}). "
            "Name the slice with +hardware=v4-16 (or another of conf/hardware), and its memory with "
            "memfit.hardware.capacity_bytes=BYTES."
        )
    return found


def is_tpu_host(environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether anything says that this host has a TPU: a variable, ``/dev/accel*``, or a chip on the PCI bus."""
    if any(environ.get(name) for name in _HINTS) or any((root / "dev").glob("accel[0-9]*")):
        return True
    return any(_is_accelerator(device) for device in (root / "sys/bus/pci/devices").glob("*"))


def _is_accelerator(device: Path) -> bool:
    """Google's network card has the same vendor; the device number tells the chips from it."""
    try:
        vendor, number = ((device / name).read_text().strip() for name in ("vendor", "device"))
    except OSError:
        return False
    return vendor == GOOGLE_PCI_VENDOR and number in GOOGLE_PCI_TPUS


def detect(
    environ: Mapping[str, str], *, root: Path = Path("/"), timeout_s: float = METADATA_TIMEOUT_S
) -> Hardware | None:
    """Return the slice of this host, or ``None`` when it is no TPU host.

    Raises `HardwareNotDetected` when it is one and the slice cannot be told: neither variable nor metadata, or a type
    without facts.
    """
    if not is_tpu_host(environ, root):
        return None
    facts, source = _facts(environ, timeout_s)
    kind = parse_type(facts["TPU_ACCELERATOR_TYPE"])
    known = catalog.load(kind.name)
    per_host = _product(facts.get("TPU_CHIPS_PER_HOST_BOUNDS")) or min(known.gpus_per_node or 4, kind.chips)
    hosts = _product(facts.get("TPU_HOST_BOUNDS")) or _hosts(facts) or max(1, kind.chips // per_host)
    found = replace(
        known, name=kind.name, gpus_per_node=per_host, nodes=hosts, source=f"{source}; capacity: {known.source}"
    )
    return _visible(found, environ, chips=kind.chips)


def _facts(environ: Mapping[str, str], timeout_s: float) -> tuple[Mapping[str, str], str]:
    if environ.get("TPU_ACCELERATOR_TYPE"):
        return environ, "TPU_ACCELERATOR_TYPE"
    host = environ.get("GCE_METADATA_HOST") or environ.get("GCE_METADATA_IP") or "metadata.google.internal"
    facts = _tpu_env(_ask(host, "tpu-env", timeout_s) or "")
    if "TPU_ACCELERATOR_TYPE" not in facts and (answer := _ask(host, "accelerator-type", timeout_s)):
        facts["TPU_ACCELERATOR_TYPE"] = answer.strip()
    if "TPU_ACCELERATOR_TYPE" not in facts:
        raise HardwareNotDetected(
            "this host has a TPU, and neither TPU_ACCELERATOR_TYPE nor the VM's metadata server says which slice it is "
            "of. Name it with +hardware=v4-16 (or another of conf/hardware), or export TPU_ACCELERATOR_TYPE=v4-16."
        )
    return facts, f"metadata server {host}"


def _ask(host: str, attribute: str, timeout_s: float) -> str | None:
    request = urllib.request.Request(f"http://{host}{_PATH}{attribute}", headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: a proxy could only mislead
    try:
        with direct.open(request, timeout=timeout_s) as answer:
            if answer.headers.get("Metadata-Flavor") != "Google":
                return None
            return str(answer.read(65536).decode(errors="replace"))
    except (OSError, urllib.error.URLError, ValueError):
        return None


def _tpu_env(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    pairs = {key.strip(): value.strip().strip("'\"") for key, _, value in lines if value.strip()}
    return {f"TPU_{key}" if not key.startswith("TPU_") else key: value for key, value in pairs.items()}


def _product(bounds: str | None) -> int:
    parts = (bounds or "").split(",")
    return prod(map(int, parts)) if all(p.strip().isdigit() for p in parts) else 0


def _hosts(facts: Mapping[str, str]) -> int:
    return len([name for name in facts.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()])


def _visible(found: Hardware, environ: Mapping[str, str], chips: int) -> Hardware:
    named = environ.get("TPU_VISIBLE_CHIPS") or environ.get("TPU_VISIBLE_DEVICES")
    count = len([c for c in (named or "").split(",") if c.strip()])
    if not count or count >= (found.gpus_per_node or chips):
        return found
    note = f"only {count} of this host's {found.gpus_per_node} devices are visible (TPU_VISIBLE_CHIPS={named})"
    return replace(found, gpus_per_node=count, nodes=1, warnings=(*found.warnings, note))

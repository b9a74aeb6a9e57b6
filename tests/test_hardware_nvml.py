"""Detection through the real NVML bindings, against a driver library that plays scenarios."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.hardware import catalog, nvml
from hydra_plugins.memfit.hardware.spec import Hardware
from support.fake_driver import A40, H100, H200, RTX4090, Driver, Gpu

UUID = "GPU-{0}0000000-aaaa-bbbb-cccc-{0:012d}".format
SLICE = Gpu(
    name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", total=40448, reserved=20, uuid="MIG-11111111-2222", extra=("gi=2", "ci=0")
)
SMALL = Gpu(
    name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", total=9856, reserved=5, uuid="MIG-33333333-4444", extra=("gi=9", "ci=0")
)
CUT = replace(H100, extra=("ecc=1",), slices=(SLICE, SMALL))
EIGHT = (H100,) * 8
BUSY = (H100, replace(H100, used=30000), replace(H100, used=100))


def detect(gpus: tuple[Gpu, ...], directory: Path, *, old: bool = False, **variables: str) -> Hardware:
    """Detect the hardware of a scenario with these environment variables."""
    return nvml.detect(Driver(gpus=gpus, old=old).environ(directory, **variables))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A scenario and what detection must say of it."""

    id: str
    gpus: tuple[Gpu, ...]
    visible: str | None = None
    pci_order: bool = False
    old: bool = False
    name: str = "h100"
    capacity: int | None = None
    """``None``: the capacity in the file."""
    count: int = 1
    held: int = 0
    warns: tuple[str, ...] = field(default=())


def conf(name: str) -> int:
    """Return the capacity that a file promises."""
    return catalog.load(name).capacity_bytes


def left(mib: int) -> int:
    """Return what detection leaves of ``mib`` MiB that the driver does not keep: all but a thousandth."""
    return mib * MIB - -(-mib * MIB // 1000)


ROWS = [
    Row(id="one", gpus=(H100,)),
    Row(id="eight", gpus=EIGHT, count=8),
    Row(id="h200", gpus=(H200,), name="h200"),
    Row(id="by number", gpus=BUSY, visible="0,2", count=2, held=100 * MIB),
    Row(id="the fullest counts", gpus=BUSY, count=3, held=30000 * MIB),
    Row(id="spaces and signs", gpus=BUSY, visible=" 0, +2", count=2, held=100 * MIB),
    Row(id="a number is read as far as it goes", gpus=BUSY, visible="2gpu", held=100 * MIB),
    Row(id="the list ends at a negative number", gpus=EIGHT, visible="0,1,-1,2", count=2),
    Row(id="the list ends at a number too high", gpus=EIGHT, visible="0,9,1"),
    Row(id="the list ends at a word", gpus=EIGHT, visible="3,x,1"),
    Row(id="full uuid", gpus=BUSY, visible=UUID(1), held=30000 * MIB),
    Row(id="abbreviated uuids", gpus=BUSY, visible="GPU-2,GPU-0", count=2, held=100 * MIB),
    Row(id="an unknown uuid ends the list", gpus=BUSY, visible="GPU-2,GPU-f,GPU-1", held=100 * MIB),
    Row(id="a number after uuids ends the list", gpus=BUSY, visible="GPU-2,1", held=100 * MIB),
    Row(
        id="a MIG slice by uuid",
        gpus=(CUT,),
        visible="MIG-33333333-4444",
        name=SMALL.name,
        capacity=left(9851),
        warns=("a MIG slice",),
    ),
    Row(
        id="a MIG slice by its beginning",
        gpus=(H100, CUT),
        visible="MIG-33",
        name=SMALL.name,
        capacity=left(9851),
        warns=("a MIG slice",),
    ),
    Row(
        id="a MIG slice in the older form",
        gpus=(H100, CUT),
        visible=f"MIG-{UUID(1)}/2/0",
        name=SLICE.name,
        capacity=left(40428),
        warns=("a MIG slice",),
    ),
    Row(
        id="only the first slice counts",
        gpus=(CUT,),
        visible="MIG-33333333-4444,MIG-11111111-2222",
        name=SMALL.name,
        capacity=left(9851),
        warns=("the first of 2",),
    ),
    Row(
        id="a cut GPU shows its first slice", gpus=(CUT,), name=SLICE.name, capacity=left(40428), warns=("a MIG slice",)
    ),
    Row(
        id="a cut GPU by number",
        gpus=(CUT, CUT),
        visible="1",
        name=SLICE.name,
        capacity=left(40428),
        warns=("a MIG slice",),
    ),
    Row(
        id="a slice that an older driver calls by its GPU's name",
        gpus=(replace(H100, slices=(replace(SMALL, name=H100.name),)),),
        name="NVIDIA H100 80GB HBM3 MIG slice",
        capacity=left(9851),
        warns=("a MIG slice",),
    ),
    Row(
        id="mixed kinds",
        gpus=(H100, RTX4090, RTX4090),
        name="rtx4090",
        count=3,
        warns=("several kinds: NVIDIA H100 80GB HBM3 with 79.10 GiB, NVIDIA GeForce RTX 4090 with 23.51 GiB",),
    ),
    Row(
        id="mixed kinds by number, in an order that is not known",
        gpus=(H100, RTX4090),
        visible="0",
        name="rtx4090",
        warns=("CUDA's order is not the driver's", "several kinds"),
    ),
    Row(id="mixed kinds by number in bus order", gpus=(H100, RTX4090), visible="0", pci_order=True),
    Row(id="mixed kinds by uuid", gpus=(H100, RTX4090), visible=UUID(1), name="rtx4090"),
    Row(
        id="a rebuilt RTX 4090 with 48 GB",
        gpus=(replace(RTX4090, total=49140, reserved=500),),
        name="rtx4090",
        capacity=left(48640),
        warns=("offers 47.45 GiB, not the 23.51 GiB of conf/hardware/rtx4090.yaml: the driver's number counts",),
    ),
    Row(
        id="an A40 without ECC",
        gpus=(replace(A40, total=49140, reserved=452, extra=("ecc=0",)),),
        name="a40",
        capacity=left(48688),
        warns=("ECC is off",),
    ),
    Row(id="an A40 with ECC", gpus=(A40,), name="a40"),
    Row(
        id="an H20 with 141 GB",
        gpus=(replace(H200, name="NVIDIA H20"),),
        name="h20",
        capacity=left(143071),
        warns=("not the 95.00 GiB",),
    ),
    Row(
        id="GH200: 480GB in the name is the CPU's",
        gpus=(Gpu(name="NVIDIA GH200 480GB", total=97871, reserved=591),),
        name="gh200",
    ),
    Row(id="a driver that keeps more", gpus=(replace(H100, reserved=1200),), capacity=left(80359)),
    Row(
        id="a product without a file",
        gpus=(Gpu(name="NVIDIA X1 Ultra", total=65536, reserved=536),),
        name="NVIDIA X1 Ultra",
        capacity=left(65000),
        warns=("no file in conf/hardware lists 'NVIDIA X1 Ultra'",),
    ),
    Row(
        id="an old driver, a known product",
        gpus=(H100,),
        old=True,
        warns=("does not say how much it keeps: 1.19 GiB of 79.65 GiB",),
    ),
    Row(
        id="an old driver, an unknown product",
        gpus=(Gpu(name="NVIDIA X1", total=16384, reserved=300, used=4000),),
        old=True,
        name="NVIDIA X1",
        capacity=left(16384 - 600),
        held=3700 * MIB,
        warns=("is assumed", "no file"),
    ),
    Row(
        id="a GPU of another job is not counted",
        gpus=(replace(H100, extra=("fail=nvmlDeviceGetHandleByIndex_v2:4",)), H100),
        visible="0",
    ),
    Row(
        id="a lost GPU that is not visible",
        gpus=(replace(H100, extra=("fail=nvmlDeviceGetHandleByIndex_v2:15",)), H100, H100),
        visible="2,1",
        count=2,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_what_is_visible_is_what_counts(row: Row, tmp_path: Path) -> None:
    """Name, capacity, count, held memory and warnings of each scenario."""
    variables = {} if row.visible is None else {"CUDA_VISIBLE_DEVICES": row.visible}
    if row.pci_order:
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    found = detect(row.gpus, tmp_path, old=row.old, **variables)
    assert (found.name, found.capacity_bytes, found.gpus_per_node) == (
        row.name,
        row.capacity or conf(row.name),
        row.count,
    )
    assert found.held_bytes == row.held
    assert len(found.warnings) == len(row.warns)
    for part in row.warns:
        assert any(part in warning for warning in found.warnings), (part, found.warnings)


NOTHING: list[tuple[str, tuple[Gpu, ...], str, str]] = [
    ("empty", EIGHT, "", "set and empty, so no GPU is visible in this process: a Ray task without num_gpus"),
    ("only spaces", EIGHT, " ", "set and empty"),
    ("negative", EIGHT, "-1", "hides every GPU"),
    ("Slurm without a GPU", EIGHT, "NoDevFiles", "Slurm gave this job no GPU"),
    ("too high", (H100,), "1", "its first entry '1' names no device of this host"),
    ("a word", (H100,), "all", "its first entry 'all' names no device"),
    ("a leading comma", (H100,), ",0", "its first entry '' names no device"),
    ("twice", EIGHT, "1,2,1", "names one device twice: CUDA then shows none"),
    ("twice in other words", EIGHT, "GPU-1,GPU-10", "names one device twice"),
    ("ambiguous", EIGHT, "GPU-", "names no device"),
    ("unknown uuid", EIGHT, "GPU-ffff", "names no device"),
    ("unknown slice", (CUT,), "MIG-ffff", "names no device"),
    ("a slice of a whole GPU", (H100,), f"MIG-{UUID(0)}/1/0", "names no device"),
    ("ambiguous slice", (CUT,), "MIG-", "names no device"),
    (
        "MIG without a slice",
        (replace(H100, extra=("mig=1",)),),
        "0",
        "MIG is on for GPU 0 and no MIG device of it is visible",
    ),
    ("no GPU at all", (), "0", "lists no GPU that this process may open"),
    (
        "none allowed",
        (replace(H100, extra=("fail=nvmlDeviceGetHandleByIndex_v2:4",)),),
        "0",
        "lists no GPU that this process",
    ),
    (
        "lost",
        (replace(H100, extra=("fail=nvmlDeviceGetHandleByIndex_v2:15",)),),
        "0",
        "GPU 0 is visible and cannot be read: the GPU has fallen",
    ),
    (
        "unified memory",
        (
            Gpu(
                name="NVIDIA GB10",
                total=0,
                extra=("fail=nvmlDeviceGetMemoryInfo:3", "fail=nvmlDeviceGetMemoryInfo_v2:3"),
            ),
        ),
        "0",
        "its memory is the host's own (GB10, Jetson)",
    ),
    ("no memory", (Gpu(name="NVIDIA X1", total=0),), "0", "reports a total of 0 bytes"),
]


@pytest.mark.parametrize(("gpus", "visible", "message"), [row[1:] for row in NOTHING], ids=[row[0] for row in NOTHING])
def test_nothing_usable_is_an_error_with_its_reason(
    gpus: tuple[Gpu, ...], visible: str, message: str, tmp_path: Path
) -> None:
    """The reason is the one that applies; another GPU is never taken instead."""
    with pytest.raises(HardwareNotDetected) as caught:
        detect(gpus, tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert message in str(caught.value)


def test_readings_of_each_device_are_kept(tmp_path: Path) -> None:
    """The answer carries each visible device as it was read."""
    found = detect((H100, replace(H200, used=5)), tmp_path)
    first, second = found.devices
    assert (first.index, first.uuid, first.product, first.ecc, first.mig) == (
        0,
        UUID(0),
        "NVIDIA H100 80GB HBM3",
        True,
        False,
    )
    assert (second.total_bytes, second.reserved_bytes, second.held_bytes) == (143771 * MIB, 700 * MIB, 5 * MIB)
    assert found.source == "NVML, driver 570.86.10" and found.compute_capability == "9.0"


def test_the_facts_of_the_file_come_along(tmp_path: Path) -> None:
    """Bandwidth and arithmetic rate, which NVML does not report, are the product's; a slice has none."""
    whole, part = detect((H200,), tmp_path), detect((CUT,), tmp_path)
    assert (whole.memory_bandwidth_bytes_per_s, whole.bf16_dense_flops) == (4800 * 10**9, 989 * 10**12)
    assert (part.memory_bandwidth_bytes_per_s, part.bf16_dense_flops) == (None, None)


def test_what_this_process_holds_is_not_held_by_others(tmp_path: Path) -> None:
    """A launcher that already has a context on the GPU does not count against itself."""
    mine = replace(H100, used=3000, extra=(f"process={os.getpid()}:2900",))
    other = replace(H100, used=3000, extra=("process=1:2900",))
    assert detect((mine,), tmp_path).held_bytes == 100 * MIB
    assert detect((other,), tmp_path).held_bytes == 3000 * MIB


def test_a_name_and_auto_give_one_capacity(tmp_path: Path) -> None:
    """On a card that is what its name says, `auto` plans with the same number as the name."""
    for gpu, name in ((H100, "h100"), (H200, "h200"), (A40, "a40"), (RTX4090, "rtx4090")):
        assert detect((gpu,), tmp_path).capacity_bytes == catalog.load(name).capacity_bytes


def test_the_capacity_is_what_torch_printed(tmp_path: Path) -> None:
    """Total less reserved is torch's total_memory: readings of nvidia-smi -q beside torch's, within 0.2 %."""
    for total, reserved, torch_gib in ((81559, 551, 79.11), (143771, 700, 139.72)):
        found = detect((Gpu(name="unlisted", total=total, reserved=reserved),), tmp_path)
        assert torch_gib * 0.998 <= found.capacity_bytes / GIB <= torch_gib + 0.005


BROKEN: list[tuple[str, Callable[[Path], dict[str, str]], str]] = [
    ("no library", lambda path: {**os.environ, "LD_LIBRARY_PATH": str(path)}, "no NVIDIA driver library"),
    ("a library that is none", lambda path: _text_library(path), "no NVIDIA driver library"),
]


def _text_library(path: Path) -> dict[str, str]:
    (path / "libnvidia-ml.so.1").write_text("not a library")
    return {**os.environ, "LD_LIBRARY_PATH": str(path)}


@pytest.mark.parametrize(("environ", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_host_without_a_driver(environ: Callable[[Path], dict[str, str]], message: str, tmp_path: Path) -> None:
    """No library, or a file that is no library, is the same clear answer."""
    if any(
        Path(folder, "libnvidia-ml.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
    ):
        pytest.skip("this host has a driver")
    with pytest.raises(HardwareNotDetected, match=message):
        nvml.detect(environ(tmp_path))

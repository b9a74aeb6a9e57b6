"""What is read of the files that a run leaves behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.learning.kind import DEVICE, RESERVED
from hydra_plugins.memfit.learning.readings import KEY, MOST_BYTES, read

VERL = f"step:1 - global_seqlen/min:9 - {KEY}:12.5 - perf/max_memory_allocated_gb:99.5\n"
AREAL = (
    "20261121-10:00:00.123 FSDPEngine INFO: Memory-Usage after ppo update: memory allocated (GB): 1.50, "
    "memory reserved (GB): 3.50, device memory used/total (GB): 20.25/79.25\n"
)
SMI = "index, memory.used [MiB], memory.total [MiB]\n0, 1024 MiB, 81920 MiB\n1, 2048 MiB, 81920 MiB\n0, [N/A], 81920 MiB\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.log", VERL, {(RESERVED, 12.5 * GIB, 1)}),
        (
            "a.log",
            f"(TaskRunner pid=7, ip=1.2.3.4) {VERL}noise\n{VERL.replace('12.5', '13')}",
            {(RESERVED, 13 * GIB, 2)},
        ),
        ("a.log", VERL.replace("12.5", "np.float64(14.5)"), {(RESERVED, 14.5 * GIB, 1)}),
        ("a.log", f"\x1b[36m(main pid=1)\x1b[0m {VERL}", {(RESERVED, 12.5 * GIB, 1)}),
        ("a.log", AREAL * 2, {(RESERVED, 3.5 * GIB, 2), (DEVICE, 20.25 * GIB, 2)}),
        ("a.jsonl", json.dumps({"step": 1, "data": {KEY: 2.5}}) + "\n{broken\n", {(RESERVED, 2.5 * GIB, 1)}),
        ("a.jsonl", json.dumps({KEY: 3, "step": 2}) + "\n[1]\n{}\n", {(RESERVED, 3 * GIB, 1)}),
        ("a.jsonl", json.dumps({KEY: "many"}), set()),
        ("a.csv", SMI, {(DEVICE, 2048 * MIB, 2)}),
        ("a.csv", "timestamp, memory.used [MiB]\n2026, 7\n", {(DEVICE, 7 * MIB, 1)}),
        ("a.log", "nothing of interest\n", set()),
        ("a.log", f"{KEY}:999999999999999 - {KEY}:0 - {KEY}:-1\n", set()),
    ],
)
def test_known_formats(tmp_path: Path, name: str, text: str, expected: set[tuple[str, float, int]]) -> None:
    """The largest reading of each scope counts, and how many there were."""
    file = tmp_path / name
    file.write_text(text)
    assert {(found.scope, found.peak_bytes, found.count) for found in read(file)} == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "index, utilization.gpu [%]\n", "no column memory.used. Sample with: nvidia-smi"),
        ("none.log", None, "No such file"),
        ("none.csv", None, "No such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """Each is one clear error that names the file."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


@settings(max_examples=60)
@given(
    noise=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.sampled_from(
                [VERL.encode(), AREAL.encode(), SMI.encode(), KEY.encode() + b":", b'{"data":', b"[" * 5000]
            ),
        ),
        max_size=8,
    ),
    suffix=st.sampled_from([".log", ".jsonl", ".csv"]),
)
def test_no_file_breaks_the_readers(tmp_path_factory: pytest.TempPathFactory, noise: list[bytes], suffix: str) -> None:
    """Whatever a file holds, the answer is sizes that a device can have, or one clear error."""
    file = tmp_path_factory.mktemp("noise") / f"a{suffix}"
    file.write_bytes(b"".join(noise))
    try:
        found = read(file)
    except ConfigError:
        return
    assert all(0 < reading.peak_bytes <= MOST_BYTES and reading.count > 0 for reading in found)


def test_packed_logs_are_read(tmp_path: Path) -> None:
    """A gzip file is read like the log that is in it; one that breaks off, up to there."""
    file = tmp_path / "a.log.gz"
    file.write_bytes(gzip.compress(VERL.encode()) + gzip.compress(VERL.encode())[:-12])
    assert [reading.peak_bytes for reading in read(file)] == [12.5 * GIB]


def test_a_line_without_end_is_read_in_pieces(tmp_path: Path) -> None:
    """A progress bar of megabytes costs no more memory than one piece of it."""
    file = tmp_path / "a.log"
    file.write_bytes(b"#" * (3 << 20) + b"\n" + VERL.encode())
    assert [reading.count for reading in read(file)] == [1]


@pytest.mark.verl
def test_tensorboard_files_are_read_through_tensorboard(tmp_path: Path) -> None:
    """What verl's own logger writes is read back; a damaged file is an error or the whole part."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    for step, value in enumerate((10.5, 12.5, 11.0)):
        writer.add_scalar(KEY, value, step)
        writer.add_scalar("actor/lr", 1e-6, step)
    writer.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    (found,) = read(file)
    assert (found.scope, found.peak_bytes, found.count) == (RESERVED, 12.5 * GIB, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + b"\0" * 40)
    try:
        assert all(reading.peak_bytes <= 12.5 * GIB for reading in read(file))
    except ConfigError as error:
        assert str(file) in str(error)

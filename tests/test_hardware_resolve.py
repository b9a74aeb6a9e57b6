"""Names, `auto`, and MEMFIT_HARDWARE: one door, and errors that say the way out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected, UnknownName
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.hardware.resolve import describe, resolve
from support.fake_driver import H100, H200, Driver

NO_GPU = Driver(extra=("fail=nvmlInitWithFlags:9",))


def host(root: Path, **files: str) -> Path:
    """Build the part of a host that detection reads."""
    content = {"proc/meminfo": f"MemTotal: {16 * 1024 * 1024} kB\n", **files}
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_name_needs_no_hardware(tmp_path: Path) -> None:
    """`hardware=h200` is answered from its file, whatever this host and MEMFIT_HARDWARE say."""
    environ = Driver(gpus=(H100,)).environ(tmp_path, MEMFIT_HARDWARE="a40")
    assert resolve("h200", environ=environ) is catalog.load("h200")


def test_auto_reads_this_host(tmp_path: Path) -> None:
    """`auto` is the GPUs of this host with this host's memory."""
    found = resolve("auto", environ=Driver(gpus=(H100, H100)).environ(tmp_path), root=host(tmp_path))
    assert (found.name, found.gpus_per_node, found.host_memory_bytes) == ("h100", 2, 16 * GIB)


def test_the_variable_answers_for_auto(tmp_path: Path) -> None:
    """MEMFIT_HARDWARE wins over the host; its memory is not this host's, and the source says who spoke."""
    environ = NO_GPU.environ(tmp_path, MEMFIT_HARDWARE=" a100-80 ")
    found = resolve("auto", environ=environ, root=host(tmp_path))
    assert (found.name, found.host_memory_bytes) == ("a100-80", None)
    assert found.source == "MEMFIT_HARDWARE=a100-80, conf/hardware/a100-80.yaml"


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    """`MEMFIT_HARDWARE= python ...` detects."""
    assert resolve("auto", environ=Driver(gpus=(H200,)).environ(tmp_path, MEMFIT_HARDWARE="")).name == "h200"


def test_the_variable_must_name_a_file() -> None:
    """An unknown value says that it came from the variable; `auto` would go in a circle."""
    with pytest.raises(UnknownName, match=r"'a100-81'\. Did you mean 'a100-80'\?.* asked for by MEMFIT_HARDWARE"):
        resolve("auto", environ={"MEMFIT_HARDWARE": "a100-81"})
    with pytest.raises(ConfigError, match="MEMFIT_HARDWARE=auto says nothing"):
        resolve("auto", environ={"MEMFIT_HARDWARE": "auto"})


@pytest.mark.parametrize(
    ("asked", "name"), [("H200", "h200"), ("RTX 3090", "rtx3090"), ("rtx-3090", "rtx3090"), ("A100_80", "a100-80")]
)
def test_another_spelling_of_a_name_is_answered_with_the_name_alone(asked: str, name: str) -> None:
    """Case, spaces and punctuation apart it is that one: the list of all names would only hide it."""
    with pytest.raises(UnknownName, match=rf"^unknown hardware '{asked}'\. Did you mean '{name}'\?$"):
        catalog.load(asked)


def test_nothing_found_says_why_and_what_to_do(tmp_path: Path) -> None:
    """The error has NVML's reason, both ways out and every name."""
    with pytest.raises(HardwareNotDetected) as caught:
        resolve("auto", environ=NO_GPU.environ(tmp_path), root=host(tmp_path))
    text = str(caught.value)
    assert text.startswith("hardware=auto found no accelerator: NVML: the NVIDIA kernel driver is not loaded")
    assert "+hardware=<name>, or MEMFIT_HARDWARE=<name>" in text and all(name in text for name in catalog.names())


def test_a_ray_driver_without_gpus_is_told_so(tmp_path: Path) -> None:
    """In a Ray task without GPUs the message is about the task, not about a missing driver."""
    with pytest.raises(HardwareNotDetected, match=r"a Ray task without num_gpus.*MEMFIT_HARDWARE="):
        resolve("auto", environ=Driver(gpus=(H100,)).environ(tmp_path, CUDA_VISIBLE_DEVICES=""), root=host(tmp_path))


def test_a_tpu_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    """A host with /dev/accel0 and a slice type is that slice; NVML's failure is not the end."""
    environ = NO_GPU.environ(tmp_path, TPU_ACCELERATOR_TYPE="v4-16")
    found = resolve("auto", environ=environ, root=host(tmp_path, **{"dev/accel0": ""}))
    assert (found.name, found.kind, found.nodes, found.gpus_per_node) == ("v4-16", "tpu", 2, 4)
    assert found.host_memory_bytes == 16 * GIB


def test_a_description_is_plain_json(tmp_path: Path) -> None:
    """`describe` survives a round trip through JSON and has each device's reading."""
    found = resolve("auto", environ=Driver(gpus=(H100, replace(H200, used=7))).environ(tmp_path))
    plain = describe(found)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["capacity_bytes"] == found.capacity_bytes
    assert [device["product"] for device in plain["devices"]] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


def test_threads_get_one_answer(tmp_path: Path) -> None:
    """Detections at the same time do not disturb each other."""
    environ = Driver(gpus=(H100, H100)).environ(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: resolve("auto", environ=environ, root=host(tmp_path)), range(4)))
    assert answers == [answers[0]] * 4

"""One reading of the hardware for every process of a launch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.compose.handover import VARIABLE, hardware_of
from hydra_plugins.memfit.hardware.catalog import load
from hydra_plugins.memfit.hardware.spec import Device

AUTO = {"name": "auto", "capacity_bytes": None, "held_bytes": None, "gpus_per_node": None}
NONE: frozenset[str] = frozenset()


def handed(*, pid: int, held_bytes: int, asked: str | None = None, visible: str | None = None) -> str:
    """Return what a process leaves for its children when it detected an A40."""
    device = Device(index=0, uuid=None, product="A40", total_bytes=9, reserved_bytes=1, usable_bytes=8, held_bytes=7)
    hardware = asdict(replace(load("a40"), held_bytes=held_bytes, devices=(device,)))
    return json.dumps({"pid": pid, "asked": asked, "visible": visible, "hardware": hardware})


def test_a_child_takes_what_its_parent_read() -> None:
    """A trainer rank that sees one device and other free memory plans with the launcher's reading."""
    environ = {VARIABLE: handed(pid=os.getpid() + 1, held_bytes=7), "CUDA_VISIBLE_DEVICES": "3"}

    hardware = hardware_of(AUTO, NONE, environ)

    assert (hardware.name, hardware.held_bytes, hardware.devices[0].product) == ("a40", 7, "A40")


def test_what_is_detected_is_left_for_the_children() -> None:
    """The first process writes the variable, and reads the same from it again."""
    environ = {"MEMFIT_HARDWARE": "a100-80"}

    first = hardware_of(AUTO, NONE, environ)

    assert first.name == "a100-80"
    assert json.loads(environ[VARIABLE])["hardware"]["name"] == "a100-80"
    assert hardware_of(AUTO, NONE, environ) == first


def test_another_answer_for_auto_is_read_anew() -> None:
    """A changed MEMFIT_HARDWARE is a new question: the old reading is not taken."""
    environ = {VARIABLE: handed(pid=os.getpid() + 1, held_bytes=7), "MEMFIT_HARDWARE": "l4"}

    assert hardware_of(AUTO, NONE, environ).name == "l4"


def test_this_process_reads_anew_when_it_sees_other_devices() -> None:
    """A notebook that changes CUDA_VISIBLE_DEVICES between two configs gets a new reading."""
    old = handed(pid=os.getpid(), held_bytes=7, asked="l4", visible="0")
    environ = {VARIABLE: old, "MEMFIT_HARDWARE": "l4", "CUDA_VISIBLE_DEVICES": "1"}

    assert hardware_of(AUTO, NONE, environ).name == "l4"
    assert environ[VARIABLE] != old


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"hardware": {"name": "a40"}}'])
def test_a_broken_variable_is_a_clear_error(broken: str) -> None:
    """Whatever stands in the variable, the message says to unset it."""
    with pytest.raises(ConfigError, match=f"unset {VARIABLE}"):
        hardware_of(AUTO, NONE, {VARIABLE: broken})


def test_what_the_user_counts_wins() -> None:
    """A number beside name: auto replaces what was read, and the source says so."""
    environ = {"MEMFIT_HARDWARE": "a40"}

    hardware = hardware_of({**AUTO, "capacity_bytes": 10, "gpus_per_node": 2}, NONE, environ)

    assert (hardware.capacity_bytes, hardware.gpus_per_node) == (10, 2)
    assert "capacity_bytes, gpus_per_node from the command line" in hardware.source


@pytest.mark.parametrize("value", [-1, 1.5, "80GB", True])
def test_a_wrong_count_is_a_clear_error(value: object) -> None:
    """The message names the key."""
    with pytest.raises(ConfigError, match=r"memfit\.hardware\.capacity_bytes"):
        hardware_of({**AUTO, "capacity_bytes": value}, NONE, {"MEMFIT_HARDWARE": "a40"})


@pytest.mark.parametrize("node", [None, "auto", {}, {"name": 3}])
def test_a_node_that_no_group_wrote(node: object) -> None:
    """memfit.hardware without the group's facts is an error that shows the group."""
    with pytest.raises(ConfigError, match=r"\+hardware=auto"):
        hardware_of(node, NONE, {})


def test_an_unknown_answer_for_auto() -> None:
    """MEMFIT_HARDWARE with an unknown name lists the known ones."""
    with pytest.raises(UnknownName, match="a100-80"):
        hardware_of(AUTO, NONE, {"MEMFIT_HARDWARE": "a41"})

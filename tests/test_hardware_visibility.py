"""CUDA_VISIBLE_DEVICES against torch's own parser, an independent reading of the same rules."""

from __future__ import annotations

import random

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.hardware.visibility import Board, Reading, select


def board(index: int) -> Board:
    """Return a whole GPU with a UUID that begins with its number."""
    uuid = f"GPU-{index}abcdef0-1111"
    reading = Reading(
        index=index,
        uuid=uuid,
        product="X",
        total_bytes=1,
        reserved_bytes=0,
        used_bytes=0,
        own_bytes=0,
        compute_capability=None,
        ecc=None,
    )
    return Board(index=index, uuid=uuid, whole=reading)


BOARDS = [board(index) for index in range(4)]


def ours(value: str) -> list[int]:
    """Return the indices that memfit takes for visible."""
    try:
        return [reading.index for reading in select(BOARDS, {"CUDA_VISIBLE_DEVICES": value}).readings]
    except HardwareNotDetected:
        return []


def torchs(value: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the indices that torch takes for visible, counted as its NVML path counts them."""
    import torch.cuda as cuda

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    parsed = cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        return list(cuda._transform_uuid_to_ordinals(parsed, [str(board.uuid) for board in BOARDS]))
    inside = [index for index in parsed if isinstance(index, int)]
    stop = next((place for place, index in enumerate(inside) if index >= len(BOARDS)), len(inside))
    return inside[:stop]


def spellings(seed: int) -> str:
    """Return a random value of the variable, often a broken one."""
    rng = random.Random(seed)
    words = ["0", "1", "2", "3", " 1", "2x", "+3", "-1", "4", "17", "", "x", "GPU-1", "1abc", "0x1"]
    uuids = ["GPU-0", "GPU-1abcdef0-1111", "GPU-2abc", "GPU-3", "GPU-1", "GPU-9", "GPU-", "0", "MIG-1"]
    return ",".join(rng.choice(uuids if seed % 3 == 0 else words) for _ in range(rng.randint(1, 5)))


@pytest.mark.verl  # whose environment has torch
def test_visible_devices_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On thousands of spellings, most of them broken, both name the same devices in the same order."""
    differ = []
    for value in dict.fromkeys(map(spellings, range(4000))):
        mine, theirs = ours(value), torchs(value, monkeypatch)
        if mine != theirs:
            differ.append((value, mine, theirs))
    assert not differ, differ[:10]

"""Stand-ins for the kernels of a gated delta net against the wrappers of their package, and the formulas against whole layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hydra_plugins.memfit.memory.delta_net import DeltaNet, backward_bytes, forward_bytes
from hydra_plugins.memfit.model.config_json import spec_from_config

if TYPE_CHECKING:
    from tracer.ledger import Ledger

TESTS = Path(__file__).parent
SCALARS = 150_000
"""Norm weights' gradients, by multiprocessor of the device: not a matter of tokens."""

WIDE = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 128,
}
"""Heads beside which a small MLP does not count."""


@pytest.mark.verl
def test_stand_ins_take_what_flas_wrappers_take() -> None:
    """The delta rule saves and peaks at the same bytes to the byte, the gated norm but for its weight's gradient."""
    pytest.importorskip("fla", reason="pip install --no-deps fla-core einops")
    command = [sys.executable, "-m", "support.fla_wrappers"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    fla, ours = found["rule"]
    assert fla == ours
    assert fla[1] > fla[0] > 0
    fla, ours = found["norm"]
    assert fla[:2] == ours[:2]
    assert all(0 <= theirs - our <= SCALARS for theirs, our in zip(fla[2:], ours[2:], strict=True))


@pytest.mark.verl
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
def test_a_layer_with_a_small_mlp_peaks_inside_its_delta_net(name: str) -> None:
    """What the formulas say of the kernel's forward and backward peak is what a layer of the class holds, within 1 %."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from tracer import delta
    from tracer.ledger import Ledger
    from tracer.models import SHAPES

    hidden, tokens, ledger = 64, 512, Ledger()
    shape = {**SHAPES["toy-delta"], "hidden_size": hidden, "intermediate_size": 16, "num_experts": 0, **WIDE}
    config = AutoConfig.for_model(name, **{k: v for k, v in shape.items() if k != "model_type"})
    with delta.installed(), FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layer = model.model.layers[0]
        weights = {tuple(p.shape) for p in layer.parameters()} | {tuple(p.shape)[::-1] for p in layer.parameters()}
        inputs = torch.empty(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        with ledger:
            with torch.no_grad():
                out = layer(inputs, position_embeddings=None)
            del out
            middle = len(ledger.log)
            out = layer(inputs, position_embeddings=None)
            forward = len(ledger.log)
            gradient = torch.empty_like(out)
            with ledger.backward_pass():
                out.backward(gradient)
    net = DeltaNet.of(spec_from_config({**shape, "model_type": name}, name=name, source="a test"))

    peak = _peak(ledger, 0, middle, weights) + 4 * hidden * tokens  # the embeddings and the layer's input are older
    assert forward_bytes(net, hidden=hidden) * tokens == pytest.approx(peak, rel=0.01)
    peak = _peak(ledger, middle, len(ledger.log), weights, since=forward)
    assert backward_bytes(net, hidden=hidden) * tokens == pytest.approx(peak, rel=0.01)


def _peak(ledger: Ledger, start: int, end: int, weights: set[tuple[int, ...]], since: int = 0) -> int:
    """Most bytes alive in a part of the log, weights and their gradients left out, after position ``since``."""
    level = peak = 0
    for position, (index, change) in enumerate(ledger.log[start:end], start):
        block = ledger.blocks[index]
        if block.shape not in weights:
            level += change * block.num_bytes
        peak = max(peak, level if position >= since else 0)
    return peak

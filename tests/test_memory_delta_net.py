"""Layers with linear attention: what they add to a prediction, and what is said about them."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.frameworks.linear_attention import kernel_note
from hydra_plugins.memfit.memory.activations import Widths, layer_forward_bytes, layer_saved_bytes
from hydra_plugins.memfit.memory.delta_net import DeltaNet, backward_bytes, fallback_saved_bytes, saved_bytes
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.planning.roles import Role
from support.areal_launch import grpo, memfit
from support.trainer_validation import role_of, rows
from support.verl_problem import ARR, read_problem

QWEN = load("qwen3.5-4b")
NET = DeltaNet.of(QWEN)


def test_a_delta_net_has_the_widths_of_its_heads() -> None:
    """Qwen3.5-4B: 32 value heads and 16 key heads of 128; keys are repeated, the convolution sees them once."""
    assert (NET.heads, NET.q, NET.v, NET.channels, NET.states) == (32, 4096, 4096, 8192, 8192)
    assert saved_bytes(NET) == 16384 + 16384 + 32768 + 154 * 32


def test_kinds_of_layers_are_counted_one_by_one() -> None:
    """Three of four layers have a delta net: all of them together save what each kind saves, times its number."""
    full, linear = Widths.of(QWEN), Widths.of_linear(QWEN)
    assert linear is not None
    assert layer_saved_bytes(full) != layer_saved_bytes(linear)
    assert layer_forward_bytes(linear) > layer_forward_bytes(full)
    assert backward_bytes(NET, hidden=QWEN.hidden_size) > saved_bytes(NET)
    assert Widths.of_linear(load("qwen3-8b")) is None


def test_the_last_layer_of_each_group_is_attention() -> None:
    """Of Qwen3.5's 32 layers every fourth is attention, and the first ones of a pass are counted as they come."""
    role: Role = role_of(next(row["case"] for row in rows() if row["case"]["model"] == "qwen3.5-4b-text"))
    pass_ = role._pass(4096, role.update_head, 0)

    assert [i for i in range(32) if pass_.widths_of(i).delta is None] == list(range(3, 32, 4))
    assert [pass_.linear_before(n) for n in (0, 1, 3, 4, 5, 32)] == [0, 1, 3, 3, 4, 24]


@pytest.mark.parametrize(("name", "says"), [("qwen3.5-4b", "24 layers"), ("qwen3-next-80b-a3b", "36 layers")])
def test_the_kernels_that_are_taken_for_granted_are_named(name: str, says: str) -> None:
    """The note names both packages and what a token needs without them."""
    (note,) = kernel_note(load(name))

    assert says in note
    assert "flash-linear-attention and causal-conv1d" in note
    assert "needs 16 KiB more for each token" in note
    assert kernel_note(load("qwen3-8b")) == []


MEGATRON = {
    f"{ARR}.actor.strategy": "megatron",
    f"{ARR}.ref.strategy": "megatron",
    f"{ARR}.actor.megatron.tensor_model_parallel_size": 2,
    f"{ARR}.actor.megatron.expert_model_parallel_size": 4,
}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "are counted with the kernels of flash-linear-attention and causal-conv1d"),
        ({f"{ARR}.actor.ulysses_sequence_parallel_size": 4}, "whole ones on every rank (verl issue 7476)"),
        (MEGATRON, "not modelled in Megatron: they are counted as attention"),
    ],
)
def test_verl_launches_say_what_is_counted(values: dict[str, Any], says: str) -> None:
    """One warning for a plain launch, one more under Ulysses, another one in Megatron."""
    launch = {f"{ARR}.model.path": "qwen3-next-80b-a3b", f"{ARR}.model.use_remove_padding": True, **values}

    assert any(says in line for line in read_problem(launch).warnings)
    assert not any(says in line for line in read_problem({**launch, f"{ARR}.model.path": "qwen3-30b-a3b"}).warnings)


def test_areal_launches_are_planned() -> None:
    """AReaL trains Qwen3.5: the launch has an answer, and says which kernels it counts."""
    _, answer, err = memfit("check", "h100", grpo(actor__path="Qwen/Qwen3.5-4B", allocation_mode="sglang:d4+fsdp:d4"))

    assert answer, err
    assert any("flash-linear-attention" in line for line in answer["warnings"])


@pytest.mark.verl
@pytest.mark.parametrize("heads", [(2, 4, 64, 64), (4, 8, 128, 128)])
def test_torchs_own_rule_saves_what_is_said(heads: tuple[int, int, int, int]) -> None:
    """transformers' module without the kernels, traced over 256 tokens, is within 4 % of the formula."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    from tracer.ledger import Ledger

    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    config: Any = Qwen3_5TextConfig(hidden_size=128, **dict(zip(names, heads, strict=True)))
    tokens, ledger = 256, Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            module = Qwen3_5GatedDeltaNet(config, 0)
        finally:
            torch.set_default_dtype(before)
        inputs = torch.empty(1, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
        with ledger:
            out = module(inputs)
    kept = sum(change * ledger.blocks[index].num_bytes for index, change in ledger.log) - out.nbytes
    key_heads, value_heads, key, value = heads
    net = DeltaNet(
        heads=value_heads,
        q=value_heads * key,
        v=value_heads * value,
        channels=2 * key_heads * key + value_heads * value,
        states=value_heads * value * key // 64,
        packed=False,
    )

    assert kept / tokens == pytest.approx(fallback_saved_bytes(net), rel=0.04)

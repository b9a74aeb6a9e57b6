"""The tracer's stand-ins and corrections, each against the part of torch that it stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.verl
ROWS, COLUMNS = 96, 1000


@contextlib.contextmanager
def torch_autocast() -> Iterator[None]:
    """CUDA's own autocast: its dispatch needs no device, only `torch.autocast` refuses without one."""
    import torch

    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def allocations(function: Callable[[Any], Any], device: str, autocast: Any) -> list[tuple[str, int]]:
    """Return operator and bytes of everything that a function of bf16 logits allocates."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tracer.ledger import Ledger

    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        logits = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
        labels = torch.empty(ROWS, dtype=torch.int64, device=device)
        with ledger, autocast:
            function((logits, labels))
    return [(b.op, b.num_bytes) for b in ledger.blocks]


@pytest.mark.parametrize("name", ["entropy_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_naive"])
def test_casts_are_those_of_cuda_autocast(name: str) -> None:
    """verl's head allocates the same, operator by operator, under CUDA's autocast and under the tracer's."""
    import verl.utils.torch_functional as head

    from tracer.head import CudaAutocast

    def run(inputs: Any) -> Any:
        logits, labels = inputs
        return getattr(head, name)(logits) if name == "entropy_from_logits" else getattr(head, name)(logits, labels)

    ours = allocations(run, "cpu", CudaAutocast())
    assert ours == allocations(run, "cuda", torch_autocast())
    assert any(num_bytes == 4 * COLUMNS * (ROWS if "v2" not in name else 1) for _, num_bytes in ours)


def test_compiled_entropy_keeps_what_the_partitioner_keeps() -> None:
    """AOTAutograd saves the bf16 logits and three numbers a row, and returns a bf16 gradient; so does the stand-in."""
    import torch
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from verl.utils.torch_functional import entropy_from_logits

    from tracer.head import CudaAutocast
    from tracer.kernels import CompiledEntropy

    graphs: list[Any] = []

    def entropy(logits: Any) -> Any:
        with CudaAutocast():
            return entropy_from_logits(logits)

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    logits = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    partition = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    aot_function(entropy, keep, keep, **partition)(logits).sum().backward()
    inputs = [n.meta["val"] for n in graphs[1].graph.nodes if n.op == "placeholder" and "tangents" not in n.name]
    saved = sorted((x.numel(), x.dtype) for x in inputs)
    stand_in = CompiledEntropy.apply(logits).grad_fn.saved_tensors
    assert saved == sorted((x.numel(), x.dtype) for x in stand_in)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def allocated(function: Callable[[], None]) -> int:
    """Return the most bytes that a function held at once, by the profiler's record of the CPU allocator."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padded_head_takes_what_verls_takes(entropy: bool, temperature: float) -> None:
    """Without remove_padding verl goes through nested tensors; the tracer's plain tensors peak at the same bytes."""
    import torch

    from tracer import kernels
    from tracer.case import Case
    from tracer.head import Batch, Head

    rows, length, size = 4, 50, 4 * 4 * 50 * COLUMNS
    case = Case(tokens=rows * length, sequences=rows, padded=True, temperature=temperature)
    weight = torch.randn(8, COLUMNS, requires_grad=True)
    inputs = torch.randn(rows, length, 8)

    with kernels.installed(flash=True, sequences=rows, ulysses=1, padded=True):
        head, batch = Head(case), Batch.make(case, COLUMNS)

        def verls() -> None:
            raw = SimpleNamespace(logits=inputs @ weight)
            offsets = torch.arange(0, rows * length + 1, length)
            nested = torch.nested.nested_tensor_from_jagged(batch.input_ids.view(-1), offsets)
            temperatures = torch.full((rows,), temperature)
            options = {"temperature_is_one": temperature == 1.0, "temperature": temperatures}
            micro_batch = {"input_ids": nested, "use_remove_padding": False, "calculate_entropy": entropy}
            arguments = {**options, "input_ids_rmpad_rolled": batch.labels}
            out = head.engine.prepare_model_outputs(raw, arguments, micro_batch, None)
            sum(value.values().sum() for value in out.values()).backward()

        def ours() -> None:
            raw = SimpleNamespace(logits=inputs @ weight)
            sum(value.sum() for value in head.outputs(raw, batch, entropy=entropy).values()).backward()  # type: ignore[union-attr]

        for run in (verls, ours):
            run()  # first calls load code and make singletons
            weight.grad = None
        expected = allocated(verls)
        weight.grad = None
        assert allocated(ours) == pytest.approx(expected, abs=0.01 * size)


def test_views_are_no_memory_and_resizing_is() -> None:
    """The ledger counts storages: a view adds nothing, a resize releases the old bytes and takes the new ones."""
    import torch

    from tracer.ledger import Ledger

    ledger = Ledger()
    with ledger:
        x = torch.empty(1000, dtype=torch.uint8)
        y = x.view(10, 100)[2:]
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(3000)
        del x, y
    assert [(ledger.blocks[i].num_bytes, change) for i, change in ledger.log] == [
        (1000, 1), (1000, -1), (3000, 1), (3000, -1),
    ]  # fmt: skip


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_gradients_of_one_tensor_are_summed_in_place(uses: int) -> None:
    """However often a tensor is used, its gradient and one partial gradient are the most that is alive."""
    import torch

    from tracer.ledger import Ledger

    weight = torch.ones(1000, requires_grad=True)
    ledger = Ledger()
    with ledger:
        loss = sum((weight.exp().sum() for _ in range(uses)), start=torch.zeros(()))
        start = len(ledger.log)
        with ledger.backward_pass():
            loss.backward()  # type: ignore[union-attr]
    level = peak = 0
    for index, change in ledger.log[start:]:
        block = ledger.blocks[index]
        level += change * block.num_bytes if block.backward else 0
        peak = max(peak, level)
    assert peak <= 4000 * min(uses, 2) + 100


BLOCKS = {
    "qwen2_vl": ("Qwen2VLVisionBlock", "Qwen2VLVisionConfig", {"embed_dim": 64, "mlp_ratio": 4}),
    "qwen2_5_vl": ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLVisionConfig", {"hidden_size": 64, "intermediate_size": 176}),
    "qwen3_vl": ("Qwen3VLVisionBlock", "Qwen3VLVisionConfig", {"hidden_size": 64, "intermediate_size": 192}),
}


def block_allocations(kind: str, device: str) -> list[tuple[str, int]]:
    """Return operator and bytes of what norms, projection and feed-forward part of a tower's block allocate under autocast."""
    import importlib
    from unittest import mock

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tracer.ledger import Ledger
    from tracer.vision import layer_norm

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    block_name, config_name, sizes = BLOCKS[kind]
    config = getattr(module, config_name)(**sizes, num_heads=4)
    ledger, autocast = Ledger(), torch_autocast() if device == "cuda" else torch.autocast("cpu", dtype=torch.bfloat16)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Linear, "reset_parameters", lambda _: None))
        if device == "cpu":
            stack.enter_context(mock.patch.object(torch.nn.LayerNorm, "forward", layer_norm))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        torch.set_default_dtype(torch.bfloat16)
        stack.callback(torch.set_default_dtype, torch.float32)
        with torch.device(device):
            block = getattr(module, block_name)(config)
        x = torch.empty(ROWS, 64, dtype=torch.bfloat16, device=device)
        with ledger, autocast, torch.no_grad():
            block.attn.proj(block.attn.qkv(block.norm1(x)).narrow(1, 0, 64))
            block.mlp(block.norm2(x))
    return sorted((b.op, b.num_bytes) for b in ledger.blocks)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_vision_tower_runs_as_under_cuda_autocast(kind: str) -> None:
    """A block of each tower allocates the same under CUDA's autocast and under what the tracer has in its place."""
    ours = block_allocations(kind, "cpu")

    assert ours == block_allocations(kind, "cuda")
    assert ("aten.native_layer_norm.default", 4 * ROWS * 64) in ours or kind == "qwen2_5_vl"

"""Trace the peak bytes of Hugging Face ``generate``: real transformers code on tensors without data.

The model, its cache, its masks and its sampler are transformers' own and run op by op under `FakeTensorMode`. A dispatch
mode sees each new storage, a weak reference tells when it dies. Three things are ours:

* ``scaled_dot_product_attention`` allocates what its CUDA kernels allocate (the CPU kernels differ) and computes nothing;
* scratch that a CUDA kernel takes from the allocator without returning it (`SCRATCH`) is counted;
* questions about values ("is every token unpadded", "are all sequences finished") have no answer without data: a case
  says ``padded``, and the loop runs to its last step.

The loop is not run token by token: it is run for the first two tokens, and again, with the cache at its real size, for
the last two. The largest peak of both is the peak of the whole.

    PYTHONPATH=tests python -m support.generation_tracer --model qwen2.5-1.5b --rows 64 --prompt 512 --new 1024
"""

from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import yaml
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

MODELS: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "generation_models.yaml").read_text()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of ``generate``. ``rows`` are prompts times returned sequences; beams are counted on top."""

    model: str = "qwen2.5-0.5b"
    rows: int = 8
    prompt: int = 128
    new: int = 128
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    cache: str = "dynamic"
    padded: bool = False
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    output_scores: bool = False


def sort_scratch(args: tuple[Any, ...]) -> int:
    """Bytes that sorting (rows, V) takes on CUDA beside its results.

    Source: ATen/native/cuda/SortStable.cu: 2..127 rows are sorted as one list with two int2 arrays (16 bytes), else row by
    row with one int64 array (8); cub's pair sort is given room for one copy of what it sorts (key 4, value 8).
    """
    scores = args[0]
    rows = scores.numel() // scores.shape[-1]
    return int(scores.numel()) * (16 + 4 + 12 if 1 < rows < 128 else 8 + 12)


def same_size(args: tuple[Any, ...]) -> int:
    """Bytes of a copy of the first argument (multinomial draws one exponential number for each probability)."""
    return int(args[0].numel() * args[0].element_size())


SCRATCH: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    torch.ops.aten.multinomial.default: same_size,
    torch.ops.aten.sort.default: sort_scratch,
}


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of live storages; `peak` is the largest sum since the last `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, Any]] = {}
        self.current = self.peak = 0
        self.peak_op = ""

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.current

    def track(self, tensor: torch.Tensor, op: str = "given") -> None:
        """Count the storage of ``tensor`` until it dies; a view costs nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        self.live[key] = size, weakref.ref(storage, lambda _, key=key: self._gone(key))
        self._grow(size, op)

    def _gone(self, key: int) -> None:
        size, _ = self.live.pop(key)
        self.current -= size

    def _grow(self, size: int, op: str) -> None:
        self.current += size
        if self.current > self.peak:
            self.peak, self.peak_op = self.current, op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf, str(func))
        if func in SCRATCH:  # taken while the results are already there
            scratch = SCRATCH[func](args)
            self._grow(scratch, f"{func} (scratch)")
            self.current -= scratch
        return out


def cuda_sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    """Allocate what the CUDA kernels of scaled_dot_product_attention allocate in a forward without gradients.

    Flash and memory-efficient kernels alike: the output as (B, T, H, d); flash adds an fp32 log-sum-exp. A boolean mask
    becomes an additive one of the query's dtype, padded to a multiple of 16 columns (ATen/native/transformers/attention.cpp).
    """
    rows, heads, tokens, _ = query.shape
    scratch = []
    if attn_mask is None:
        scratch.append(query.new_empty((rows, heads, tokens), dtype=torch.float32))
    else:
        additive = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        pad = -additive.shape[-1] % 16
        scratch += [additive, torch.nn.functional.pad(additive, (0, pad))] if pad else [additive]
    return query.new_zeros((rows, tokens, heads, value.shape[-1])).transpose(1, 2)


def flash_attention_2(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
    """Allocate what flash-attn 2 allocates in a forward; with padding, the packed copies of q, k and v come first."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    packed = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)] if attention_mask is not None else []
    out = q.new_zeros(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    del lse
    if packed:
        out = out.clone()  # padded again
    return out, None


def _build(case: Case) -> Any:
    fields = dict(MODELS[case.model])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.max_position_embeddings = 32768
    attention = case.attention
    if attention == "flash_attention_2":
        transformers.AttentionInterface.register("traced_fa2", flash_attention_2)
        keep_mask = lambda *args, attention_mask=None, **kw: attention_mask if case.padded else None  # noqa: E731
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        ALL_MASK_ATTENTION_FUNCTIONS.register("traced_fa2", keep_mask)
        attention = "traced_fa2"
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[case.dtype], attn_implementation=attention
    )
    # Without these tokens nothing asks whether a sequence has ended.
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


@contextlib.contextmanager
def _decided(case: Case, steps: int) -> Iterator[list[int]]:
    """Answer the questions about values: padding as the case says, unfinished until ``steps`` tokens are there."""
    from transformers import masking_utils
    from transformers.generation.utils import GenerationMixin

    original = masking_utils._ignore_causal_mask_sdpa
    asked: list[int] = []

    def ignore(padding_mask: Any, *args: Any, **kwargs: Any) -> bool:
        return not case.padded and original(None, *args, **kwargs)

    @contextlib.contextmanager
    def as_on_cuda(model: Any) -> Iterator[None]:
        # transformers keeps grouped_mm on a CPU; on an accelerator each decode step copies the chosen experts' weights.
        chosen = model.config._experts_implementation
        if chosen == "grouped_mm":
            model.set_experts_implementation("batched_mm")
        yield
        model.set_experts_implementation(chosen)

    def unfinished(*args: Any, **kwargs: Any) -> bool:
        asked.append(steps)
        return len(asked) <= steps

    with (
        mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", ignore),
        mock.patch.object(GenerationMixin, "_has_unfinished_sequences", unfinished),
        mock.patch.object(GenerationMixin, "_beam_search_has_unfinished_sequences", lambda *args: True),
        mock.patch.object(GenerationMixin, "_optimize_model_for_decode", as_on_cuda),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", cuda_sdpa),
    ):
        yield asked


def _generation_config(case: Case) -> Any:
    names = ("temperature", "top_k", "top_p") if case.do_sample else ()
    sampling = {name: getattr(case, name) for name in names}
    return transformers.GenerationConfig(
        max_new_tokens=case.new,
        do_sample=case.do_sample,
        num_beams=case.beams,
        cache_implementation=None if case.cache == "dynamic" else case.cache,
        output_scores=case.output_scores,
        return_dict_in_generate=case.output_scores,
        **sampling,
    )


def _grown_cache(model: Any, rows: int, tokens: int, dtype: torch.dtype) -> Any:
    """Return a dynamic cache as it is when ``tokens`` tokens have been seen."""
    config = model.config
    cache = transformers.DynamicCache(config=config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        sliding = cache.layers[index].is_sliding if index < len(cache.layers) else False
        length = min(tokens, config.sliding_window - 1) if sliding else tokens
        states = [torch.empty((rows, config.num_key_value_heads, length, head_dim), dtype=dtype) for _ in range(2)]
        cache.update(*states, index)
        layer = cache.layers[index]
        if sliding:
            layer.cumulative_length = tokens
    return cache


def _ids(case: Case, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.ones((case.rows, tokens), dtype=torch.long)
    mask = torch.ones_like(ids)
    if case.padded:
        mask[0, 0] = 0
    return ids, mask


def _measured(case: Case, model: Any, meter: StorageMeter, *, seen: int, steps: int) -> tuple[int, str]:
    """Peak of ``steps`` tokens of one call that starts with ``seen`` tokens in its cache; 0: with the whole prompt."""
    extra: dict[str, Any] = {}
    config, held = _generation_config(case), None
    with meter, _decided(case, steps) as asked:
        ids, mask = _ids(case, seen + 1 if seen else case.prompt)
        if seen:
            extra["past_key_values"] = _grown_cache(model, case.rows * case.beams, seen, DTYPES[case.dtype])
            config.max_new_tokens = steps
            if case.output_scores:  # one (rows, V) tensor in fp32 stays for each token so far
                held = torch.empty((case.new - steps, case.rows, model.config.vocab_size), dtype=torch.float32)
        meter.restart()
        # Beam search ends with a question about values (how long the best beam is), after its last peak.
        with contextlib.suppress(DataDependentOutputException):
            model.generate(ids, attention_mask=mask, generation_config=config, **extra)
        if len(asked) <= steps:
            raise RuntimeError(f"{case}: the loop asked {len(asked)} times whether to go on, not {steps + 1}")
        del held
        return meter.peak, meter.peak_op


def trace(case: Case, *, fake: bool = True) -> dict[str, Any]:
    """Return the peak bytes of the first and of the last steps, and of the whole call.

    ``fake=False`` allocates real tensors and runs every step: the check of the short way, for tiny models.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, torch.no_grad():
        model = _build(case)
        meter = StorageMeter()
        for tensor in [*model.parameters(), *model.buffers()]:
            meter.track(tensor)
        weights = meter.current
        peaks = {"prefill": _measured(case, model, meter, seen=0, steps=2 if fake else case.new)}
        if fake and case.cache == "dynamic" and case.new > 3:
            peaks["decode"] = _measured(case, model, meter, seen=case.prompt + case.new - 3, steps=2)
        if case.cache == "static":
            del model._cache
    peak, op = max(peaks.values())
    return {"weights_bytes": weights, **{f"{k}_bytes": v for k, (v, _) in peaks.items()}, "peak_bytes": peak,
            "peak_op": op}  # fmt: skip


def main() -> None:
    """Trace one case and print it as JSON."""
    parser = argparse.ArgumentParser(description=trace.__doc__)
    for name, default in asdict(Case()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=lambda s: s == "true", default=default)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    case = Case(**vars(parser.parse_args()))
    print(json.dumps({"case": asdict(case), **trace(case)}, indent=1))


if __name__ == "__main__":
    main()

"""``python -m support.fla_wrappers``: what flash-linear-attention's own wrappers allocate, and what the stand-ins do, as JSON.

The wrappers are fla's Python, unchanged; only the kernels that they launch do nothing, since Triton has no GPU here. Runs
in a process of its own: it puts an empty ``triton`` in place for everything that is imported after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, HEADS, WIDTH = 640, 32, 128


class _Nothing:
    """A kernel, a type of Triton's language, a decorator: whatever it is used as, nothing happens."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and not options and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda *_, **__: None

    def __or__(self, _: Any) -> Any:
        return self

    __ror__ = __or__


class _Triton(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package
    __version__ = "3.7.1"
    cdiv = staticmethod(lambda a, b: -(-a // b))
    next_power_of_2 = staticmethod(lambda n: 1 << (n - 1).bit_length())
    jit = staticmethod(lambda *args, **_: _Nothing() if args else lambda _: _Nothing())
    autotune = heuristics = staticmethod(lambda *_, **__: lambda _: _Nothing())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: Any) -> Any:
        return _Triton(spec.name)

    def exec_module(self, module: Any) -> None: ...


def _install() -> None:
    """Put the empty Triton in place, and open fla's rooms without what their ``__init__`` would import besides."""
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("triton.runtime").driver = types.SimpleNamespace()  # without a driver fla takes torch's CPU
    spec = importlib.util.find_spec("fla")
    assert spec is not None
    assert spec.submodule_search_locations
    for name in ("fla.ops", "fla.modules", "fla.ops.common", "fla.ops.gated_delta_rule"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(spec.submodule_search_locations[0]).joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def _levels(function: Callable[..., Any], *shapes: tuple[int, ...], fp32: int = -1) -> list[int]:
    """Bytes that one call leaves, and its peak; then the same of its backward pass."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tracer.ledger import Ledger

    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        kinds = [torch.float32 if i == fp32 else torch.bfloat16 for i in range(len(shapes))]
        inputs = [torch.empty(s, dtype=k, requires_grad=True) for s, k in zip(shapes, kinds, strict=True)]
        start = len(ledger.log)
        out = function(*inputs)
        middle = len(ledger.log)
        gradient = torch.empty_like(out)
        begin = len(ledger.log)
        with ledger.backward_pass():
            out.backward(gradient)
        end = len(ledger.log)
    found = []
    for first, last in ((start, middle), (begin, end)):
        level = peak = 0
        for index, change in ledger.log[first:last]:
            level += change * ledger.blocks[index].num_bytes
            peak = max(peak, level)
        found += [level, peak]
    return found


def main() -> None:
    """Print both sides."""
    _install()
    from tracer import delta

    fla_rule = importlib.import_module("fla.ops.gated_delta_rule.chunk").chunk_gated_delta_rule
    fla_norm = importlib.import_module("fla.modules.fused_norm_gate").rms_norm_gated
    heads = (1, TOKENS, HEADS)
    rows = (TOKENS * HEADS, WIDTH)

    def rule(function: Callable[..., Any]) -> list[int]:
        def call(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
            return function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        return _levels(call, *3 * [(*heads, WIDTH)], heads, heads, fp32=3)

    found = {
        "rule": [rule(fla_rule), rule(delta.delta_rule)],
        "norm": [
            _levels(lambda x, gate, weight: fla_norm(x, gate, weight, None), rows, rows, (WIDTH,)),
            _levels(delta.GatedNorm.apply, rows, rows, (WIDTH,)),
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

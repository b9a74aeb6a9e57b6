"""Which storages come and go: a dispatch mode that writes every allocation and release of tensor memory into a log."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nested._internal.nested_tensor import NestedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: Bytes that a kernel allocates for itself and returns before it ends; no operator output shows them.
#: logsumexp: the exponentials of all inputs (ATen/native/ReduceOps.cpp).
#: embedding_dense_backward: sorted indices and their order (ATen/native/cuda/Embedding.cu).
SCRATCH: dict[Any, Callable[..., int]] = {
    aten.logsumexp.default: lambda self, *_, **__: self.numel() * self.element_size(),
    aten.embedding_dense_backward.default: lambda grad, indices, *_, **__: 16 * indices.numel(),
}

#: Formulas of the backward pass that write into fresh zeros in place, unless a dispatch mode or a tensor subclass is
#: about. Source: torch/csrc/autograd/FunctionsManual.cpp and ATen/native, `areAnyTensorSubclassLike`.
IN_PLACE: dict[Any, Any] = {
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
}


@dataclass(slots=True, eq=False)
class Block:
    """One allocation: what asked for it, and when it lived (positions in the log)."""

    num_bytes: int
    op: str
    shape: tuple[int, ...]
    phase: str
    scope: str
    backward: bool
    recomputed: bool
    born: int
    died: int | None = None
    label: str = ""


class Ledger(TorchDispatchMode):
    """
    Logs storages by identity: allocated when an operator first returns them, released when their last reference dies.

    ``UntypedStorage.resize_`` is watched too, since FSDP frees and fills its gathered parameters by resizing. Shadow
    tensors of DTensor's sharding propagation are not memory and are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.log: list[tuple[int, int]] = []
        """(index of the block, +1 allocated or -1 released)"""
        self.phase = ""
        self.scope = ""
        self.backward = False
        self._live: dict[int, tuple[int | None, weakref.ref[Any]]] = {}
        self._shadow = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Ledger:
        for name in ("_propagate_tensor_meta_non_cached", "propagate_op_sharding_non_cached"):
            self.patch(ShardingPropagator, name, self._in_shadow)
        self.patch(torch.UntypedStorage, "resize_", self._watch_resize)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exc: Any) -> None:
        self._undo.close()
        super().__exit__(*exc)

    def patch(self, owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap ``owner.name`` until the ledger is left."""
        original = getattr(owner, name)
        setattr(owner, name, wrapper(original))
        self._undo.callback(setattr, owner, name, original)

    def scoped(self, scope: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a wrapper that marks what a function allocates."""

        def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
            def inside(*args: Any, **kwargs: Any) -> Any:
                before, self.scope = self.scope, scope
                try:
                    return function(*args, **kwargs)
                finally:
                    self.scope = before

            return inside

        return wrapper

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Mark what autograd's engine allocates."""
        self.backward = True
        try:
            yield
        finally:
            self.backward = False

    def label(self, tensor: torch.Tensor, label: str) -> None:
        """Say what a tensor is for; tracks it if it is older than the ledger."""
        index = self._see(tensor, "built")
        if index is not None:
            self.blocks[index].label = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, (DTensor, NestedTensor)) for t in types):
            return NotImplemented  # they come back as operators on the plain tensors inside
        if self._shadow:
            return func(*args, **kwargs)
        if func in SCRATCH:
            self._release(self._allocate(SCRATCH[func](*args, **kwargs), f"{func} scratch", ()))
        if self._accumulates(func, args):
            return aten.add_.Tensor(args[0], args[1])
        if func in IN_PLACE and self.backward and not torch.is_grad_enabled() and self._fresh_zeros(args[0]):
            return IN_PLACE[func](*args, **kwargs)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, str(func))
        return out

    def _accumulates(self, func: Any, args: Any) -> bool:
        """
        Whether autograd sums two gradients of one tensor: in place, unless a dispatch mode (this one) is active.

        Source: torch/csrc/autograd/input_buffer.cpp.
        """
        if func is not aten.add.Tensor or not self.backward or torch.is_grad_enabled():
            return False
        first, second = args[0], args[1]
        if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
            return False
        block = self._block(first)
        return first.numel() > 1 and block is not None and block.backward

    def _fresh_zeros(self, tensor: torch.Tensor) -> bool:
        block = self._block(tensor)
        return block is not None and block.backward and "zeros" in block.op

    def _block(self, tensor: torch.Tensor) -> Block | None:
        index = self._live.get(tensor.untyped_storage()._cdata, (None,))[0]
        return None if index is None else self.blocks[index]

    def _see(self, tensor: torch.Tensor, op: str) -> int | None:
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            return known[0]
        index = self._allocate(storage.size(), op, tuple(tensor.shape)) if storage.size() else None
        self._follow(storage, index)
        return index

    def _follow(self, storage: torch.UntypedStorage, index: int | None) -> None:
        key = storage._cdata

        def gone(reference: weakref.ref[Any]) -> None:
            entry = self._live.get(key)
            if entry is not None and entry[1] is reference:
                del self._live[key]
                self._release(entry[0])

        self._live[key] = (index, weakref.ref(storage, gone))

    def _allocate(self, num_bytes: int, op: str, shape: tuple[int, ...]) -> int:
        recomputed = self.backward and torch.is_grad_enabled()
        self.blocks.append(
            Block(num_bytes, op, shape, self.phase, self.scope, self.backward, recomputed, born=len(self.log))
        )
        self.log.append((len(self.blocks) - 1, 1))
        return len(self.blocks) - 1

    def _release(self, index: int | None) -> None:
        if index is not None:
            self.blocks[index].died = len(self.log)
            self.log.append((index, -1))

    def _watch_resize(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            index, reference = self._live.get(storage._cdata, (None, None))
            if reference is None:
                self._follow(storage, None)
                reference = self._live[storage._cdata][1]
            if (self.blocks[index].num_bytes if index is not None else 0) != size:
                self._release(index)
                index = self._allocate(size, "resize_", ()) if size else None
                self._live[storage._cdata] = (index, reference)
            return result

        return watched

    def _in_shadow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            self._shadow += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._shadow -= 1

        return inside

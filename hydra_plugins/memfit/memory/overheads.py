"""What a process holds outside its tensors. Every constant here is an observation, not a derivation; each names its source.

None of them has been measured by this project yet: no GPU was at hand when they were written (2026-11-21).
"""

from __future__ import annotations

from hydra_plugins.memfit.base.units import GIB, MIB

CUDA_CONTEXT_BYTES = 768 * MIB
"""CUDA context with the kernels of torch, cuBLAS and flash-attn loaded: 0.5-0.8 GiB in public OOM messages (process use less
"allocated by PyTorch" less "reserved but unallocated")."""

NCCL_BYTES = 768 * MIB
"""Communicators and their channels on one node, ring and tree, a handful of groups. AReaL logs: process use above torch's
1.75 GiB (RTX 5090) and 2.1 GiB (A100), context included."""

ENGINE_CONTEXT_BYTES = 820 * MIB
"""A sleeping vLLM process of TP 1 keeps 0.8 GiB (NVIDIA-NeMo/RL issue 223)."""

ENGINE_TENSOR_PARALLEL_BYTES = 1638 * MIB
"""What TP > 1 adds: 2.4 GiB stay at TP 2 (same issue); vLLM pull request 10511: 1.79 GiB non-torch at TP 1, 3.58 GiB at TP 2."""

ENGINE_PROFILED_BYTES = {False: 144 * MIB, True: 564 * MIB}
"""What vLLM's profile run finds outside torch, at TP 1 and above: the largest that logs of 0.11.0 name (0.14 and 0.55 GiB,
tests/data/overheads.yaml; older releases 0.16 to 0.39). Since 0.11 the share holds this much; the context that the process had
before is not in it: 0.9 x 79.18 GiB are weights, workspace, this and the KV pool, to 0.01 GiB."""

SERVED_TRAINER_BYTES = 1792 * MIB
"""A trainer that sends weights to a server of its own process group: CUDA context and NCCL together. AReaL pull request 656:
process use above what torch allocated, 1.79 GiB in the out-of-memory message of an RTX 5090, 2.1 GiB on an A100."""

SGLANG_PREFILL_TOKENS = 8192
"""Prompt tokens that meet in one prefill batch of SGLang without chunks, unless one prompt is longer. AReaL pull request
656: server processes of 25.68, 36.34 and 64.87 GiB beside ``mem_fraction_static=0.8`` on 31.36, 44.42 and 79.25 GiB."""

GRAPH_BYTES_PER_LAYER = 24 * MIB
"""CUDA graphs of vLLM's default capture list, piecewise and full. The largest of the "Graph capturing finished ... took x GiB"
lines in tests/data/overheads.yaml, a layer: 23 MiB (0.8.2); the old engine took 8 and 13."""

SGLANG_GRAPH_BYTES_PER_LAYER = 12 * MIB
"""SGLang captures decode batches only; an estimate. One log took 1.44 GiB for batches up to 512 on a B200 (SGLang pull request
11830; 28 layers by the size of its cache), four times as much."""


def trainer_context_bytes(*, world_size: int) -> int:
    """Return what a training process holds outside torch's allocator."""
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def engine_context_bytes(*, tensor_parallel: int, in_process: bool) -> int:
    """Return what an inference engine holds outside its pools; in the trainer's process the CUDA context is shared."""
    own = 0 if in_process else ENGINE_CONTEXT_BYTES
    return own + (ENGINE_TENSOR_PARALLEL_BYTES if tensor_parallel > 1 else 0)


def engine_profiled_bytes(*, tensor_parallel: int) -> int:
    """Return what vLLM counts in its share of what lies outside torch."""
    return ENGINE_PROFILED_BYTES[tensor_parallel > 1]


HOST_PROCESS_BYTES = 4 * GIB
"""Resident memory of one Python process with torch, CUDA and the framework loaded (3-5 GiB in public host-OOM reports)."""

HOST_DRIVER_BYTES = 6 * GIB
"""The driver process, Ray's own processes and its object store's working set on the head node; an estimate."""

"""The messages that `diagnose` recognises: one row each. tests/data/logs has a public example of every row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hydra_plugins.memfit.diagnosis.amount import SIZE, Amount, parse_amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Recogniser:
    """One message. Named groups ``a_*`` are sizes, ``g_*`` sizes in GiB without the unit; others are kept as printed."""

    kind: str
    needle: bytes
    """Bytes that stand in every such line: what is searched before anything is decoded."""
    pattern: re.Pattern[str]

    def read(self, text: str) -> tuple[dict[str, Amount], dict[str, str]] | None:
        """Return the sizes and the other numbers of the message in ``text``; ``None`` where it is not this message."""
        match = self.pattern.search(text)
        if match is None:
            return None
        groups = {key: value for key, value in match.groupdict().items() if value is not None}
        sizes = {key[2:]: parse_amount(value) for key, value in groups.items() if key.startswith("a_")}
        sizes |= {key[2:]: parse_amount(f"{value} GiB") for key, value in groups.items() if key.startswith("g_")}
        return sizes, {key: value for key, value in groups.items() if key[:2] not in ("a_", "g_")}


def _row(kind: str, needle: bytes, pattern: str) -> Recogniser:
    return Recogniser(
        kind=kind, needle=needle, pattern=re.compile(pattern.replace("SIZE", SIZE).replace("NUM", _NUMBER))
    )


_NUMBER = r"\d{1,12}(?:\.\d{1,6})?"
_TORCH = rb" out of memory. Tried to allocate "

ROWS = (
    # torch 2.1 and later; "capacty" up to 2.2
    _row(
        "gpu_oom",
        _TORCH,
        r"(?:CUDA|HIP|NPU|XPU) out of memory\. Tried to allocate (?P<a_asked>SIZE)\. (?:GPU|NPU|XPU) (?P<device>\d+) has a "
        r"total capac(?:i)?ty of (?P<a_capacity>SIZE)(?:,? of which|; of which) (?P<a_free>SIZE) is free\."
        r"(?: (?P<a_allowed>SIZE) allowed;?)?"
        r"(?:.{0,4000}?this process has (?P<a_process>SIZE) memory in use\.)?"
        r"(?:.{0,4000}?Of the allocated memory (?P<a_allocated>SIZE) is allocated by PyTorch"
        r"(?:, with (?P<a_private>SIZE) allocated in private pools.{0,60}?)?"
        r", and (?P<a_reserved>SIZE) is reserved by PyTorch but unallocated)?",
    ),
    # torch up to 2.0, and torch_npu
    _row(
        "gpu_oom",
        _TORCH,
        r"(?:CUDA|HIP|NPU|XPU) out of memory\. Tried to allocate (?P<a_asked>SIZE) \((?:GPU|NPU|XPU) (?P<device>\d+); "
        r"(?P<a_capacity>SIZE) total capacity; (?P<a_allocated>SIZE) already allocated; "
        r"(?:(?P<a_active>SIZE) current active; )?(?P<a_free>SIZE) free; (?P<a_reserved_all>SIZE) (?:reserved in total|cached)",
    ),
    _row("gpu_oom", _TORCH, r"(?:CUDA|HIP|NPU|XPU) out of memory\. Tried to allocate (?P<a_asked>SIZE)"),
    _row("engine_wake_oom", b"cumem_allocator", r"CUDA Error: out of memory at \S{0,200}cumem_allocator\.cpp:\d+"),
    _row(
        "engine_wake_oom",
        b"torch_memory_saver",
        r"torch_memory_saver.{0,300}(?:out of memory|result ?= ?2\b|error: 2\b)",
    ),
    _row(
        "gpu_oom",
        b"rror: out of memory",
        r"(?:CUDA|HIP) (?:driver |runtime )?error: out of memory",
    ),
    _row("gpu_oom", b"CUDA_ERROR_OUT_OF_MEMORY", r"CUDA_ERROR_OUT_OF_MEMORY"),
    _row(
        "gpu_library_oom",
        b"_STATUS_ALLOC_FAILED",
        r"(?P<library>CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED(?: when calling `(?P<call>[^`]{1,80})`)?",
    ),
    _row("nccl_oom", b"uda failure", r"NCCL WARN (?:\[?[^\]]{0,40}\]? )?Cuda failure (?:\d+ )?'out of memory'"),
    _row("nccl_oom", b"uda failure", r"Cuda failure 2 'out of memory'"),
    _row("nccl_oom", b"Failed to CUDA calloc", r"Failed to CUDA calloc (?:async )?(?P<a_asked>\d+ bytes)"),
    _row(
        "engine_free_memory",
        b"is less than desired GPU memory utilization",
        r"Free memory on device(?: \w+:\d+)? \((?P<g_free>NUM)/(?P<a_capacity>NUM GiB)\) on startup is less than desired "
        r"GPU memory utilization \((?P<share>[\d.]+), (?P<a_asked>NUM GiB)\)",
    ),
    _row(
        "engine_no_kv_cache", b"No available memory for the cache blocks", r"No available memory for the cache blocks"
    ),
    _row(
        "engine_kv_too_small",
        b"To serve at least one request with the model",
        r"with the model(?:'s|s's) max seq len \((?P<asked_tokens>\d+)\),? \(?(?P<a_asked>NUM GiB) KV cache is needed, which "
        r"is larger than the available KV cache memory \((?P<a_free>NUM GiB)\)"
        r"(?:.{0,80}estimated maximum model length is (?P<most_tokens>\d+))?",
    ),
    _row(
        "engine_kv_too_small",
        b"that can be stored in KV cache",
        r"max seq len \((?P<asked_tokens>\d+)\) is larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<most_tokens>\d+)\)",
    ),
    _row(
        "sglang_static_too_small",
        b"mem-fraction-static",
        r"Not enough memory\. Please try to increase --mem-fraction-static",
    ),
    _row(
        "engine_profiling",
        b"Error in memory profiling",
        r"Error in memory profiling\.(?: Initial free memory (?P<before>[\d.]+)[^,]{0,8}, current free memory (?P<after>[\d.]+))?",
    ),
    _row(
        "expandable_segments",
        b"xpandable segments are not compatible",
        r"xpandable segments are not compatible with memory pool",
    ),
    _row("expandable_segments", b'assert "expandable_segments:True" not in conf', r"expandable_segments:True"),
    _row(
        "xla_hbm",
        b"Ran out of memory in memory space hbm",
        r"Ran out of memory in memory space hbm\.?(?: Used (?P<a_asked>SIZE) of (?P<a_capacity>SIZE) hbm)?",
    ),
    _row(
        "xla_oom",
        b"That was not possible.",
        r"Attempting to (?:allocate|reserve) (?P<a_asked>SIZE)(?: at the bottom of memory)?\. That was not possible\. "
        r"There are (?P<a_free>SIZE) free",
    ),
    _row(
        "xla_oom",
        b"ut of memory ",
        r"RESOURCE_EXHAUSTED: Out of memory (?:while trying to )?allocat(?:e|ing) (?P<a_asked>\d+ bytes)",
    ),
    _row(
        "ray_oom",
        b"Memory on the node",
        r"Memory on the node \((?:IP: (?P<ip>[^,]{1,60}), )?.{0,400}? was (?P<a_used>NUMGB) / (?P<a_total>NUMGB) "
        r"\((?P<fraction>[\d.]+)\), which exceeds the memory usage threshold of (?P<threshold>\d+(?:\.\d+)?)",
    ),
    _row(
        "ray_oom",
        b"System memory low at node",
        r"Used memory \((?P<a_used>NUMGB)\) / total capacity \((?P<a_total>NUMGB)\)",
    ),
    _row(
        "ray_oom",
        b"killed due to memory pressure (OOM)",
        r"(?P<workers>[1-9]\d*) Workers \(tasks / actors\) killed due to memory pressure \(OOM\)",
    ),
    _row(
        "cgroup_oom",
        b"emory cgroup out of memory",
        r"Memory cgroup out of memory: Killed? process (?P<pid>\d+) \((?P<command>[^)]{1,40})\)"
        r"(?:.{0,60}anon-rss:(?P<a_used>\d+kB))?",
    ),
    _row(
        "cgroup_oom",
        b"kill event",
        r"Detected (?P<events>\d+) oom[_-]kill event(?:\(?s\)?)? in (?P<job>(?:StepId=|step )\d[\w.]{0,40}\w)",
    ),
    _row("cgroup_oom", b"OOMKilled", r"\bOOMKilled\b(?!\W{1,4}false)"),
    _row(
        "host_oom",
        b"Out of memory: Kill",
        r"Out of memory: Killed? process (?P<pid>\d+) \((?P<command>[^)]{1,40})\)(?:.{0,60}anon-rss:(?P<a_used>\d+kB))?",
    ),
    _row(
        "host_allocation",
        b"DefaultCPUAllocator",
        r"DefaultCPUAllocator: (?:not enough|can't allocate) memory: you tried to allocate (?P<a_asked>\d+ bytes)",
    ),
    _row(
        "host_allocation",
        b"Cannot allocate memory",
        r"(?:OSError|RuntimeError|\[Errno 12\]).{0,200}Cannot allocate memory",
    ),
    _row("shm_full", b"shared memory", r"might be caused by insufficient shared memory \(shm\)"),
    _row(
        "shm_full",
        b"killed by signal: Bus error",
        r"DataLoader worker \(pid (?P<pid>\d+)\) is killed by signal: Bus error",
    ),
    _row(
        "shm_full",
        b"/dev/shm/",
        r"(?:failed to extend|creating shared memory segment) /dev/shm/\S{1,80} (?:to (?P<a_asked>\d+ bytes)|"
        r"\(size (?P<size>\d+)\)).{0,40}(?:No space left|$)",
    ),
    _row("shm_full", b"posix_fallocate failed", r"NCCL WARN Call to posix_fallocate failed ?: No space left on device"),
    _row("shm_full", b"</torch_", r"unable to (?:allocate|write|mmap|resize).{0,80}</torch_\d+\S{0,40}>"),
    _row(
        "disk_full",
        b"No space left on device",
        r"(?:\[Errno 28\] |OSError: ).{0,80}No space left on device(?!.{0,80}/dev/shm)",
    ),
    _row(
        "illegal_access",
        b"an illegal memory access was encountered",
        r"CUDA\]?\w? ?error: an illegal memory access was encountered",
    ),
    _row(
        "nccl_timeout",
        b"caught collective operation timeout",
        r"(?:\[Rank (?P<rank>\d+)\] )?Watchdog caught collective operation timeout: WorkNCCL\((?:SeqNum=\d+, )?"
        r"OpType=(?P<operation>\w+).{0,120}Timeout\(ms\)=(?P<timeout_ms>\d+)",
    ),
    _row("sigkill", b"exitcode", r"exitcode\s{0,4}:? ?\(?-9\)?(?!\d)"),
    _row(
        "sigkill",
        b"SIGKILL",
        r"(?:Signal 9 \(SIGKILL\) received|died with <Signals\.SIGKILL: 9>|terminated by signal SIGKILL)",
    ),
    _row("sigkill", b"code 137", r"exit(?:ed with)? code 137\b"),
    _row("sigkill", b"status 137", r"exit(?:ed with)? status 137\b"),
    _row("sigkill", b"exit_code", r"exit_code\W{1,3}137\b"),
    _row("sigkill", b"Killed", r"^(?:\S{1,200}: line \d+:\s+\d+ )?Killed(?:\s{2,}\S.{0,200})?$"),
    _row("worker_died", b"Worker unexpectedly exits", r"Worker unexpectedly exits with a connection error code 2"),
    _row("worker_died", b"exceeded K8s pod memory", r"may have exceeded K8s pod memory limits"),
)
"""In the order in which they are tried on a line; the first that matches counts."""

NEEDLES = tuple(sorted({row.needle for row in ROWS}))

OTHER_PROCESS = re.compile(rf"Process (\d{{1,10}}) has ({SIZE}) memory in use\.")

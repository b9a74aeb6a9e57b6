"""The sorts of failure that `diagnose` knows, and what helps against each."""

from __future__ import annotations

from hydra_plugins.memfit.diagnosis.finding import Kind

_HOST = (
    "Give the job more host memory, or keep less there: offload moves states to the host, and each rank adds its own. "
    "memfit plan shows the host's share of a launch."
)

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="gpu_oom",
            title="the GPU is out of memory",
            resource="gpu",
            advice="memfit plan on this launch says which values fit.",
        ),
        Kind(
            name="gpu_library_oom",
            title="a CUDA library is out of GPU memory",
            resource="gpu",
            advice="The GPU was full when a library asked for its workspace: lower what the phase before it keeps.",
        ),
        Kind(
            name="nccl_oom",
            title="NCCL is out of GPU memory",
            resource="gpu",
            advice="NCCL allocates outside torch's pool: leave more of the GPU free (a larger memfit.margin, a smaller "
            "share of the engine).",
        ),
        Kind(
            name="engine_wake_oom",
            title="the engine found no room when it woke up",
            resource="gpu",
            phase="kv_resume",
            advice="The engine maps its share again while the trainer holds its states: lower the engine's share, or "
            "offload the states.",
        ),
        Kind(
            name="engine_free_memory",
            title="the engine was promised more of the GPU than was free when it started",
            resource="engine",
            phase="launch",
            advice="Lower gpu_memory_utilization, or free the GPU: other processes hold the rest.",
        ),
        Kind(
            name="engine_no_kv_cache",
            title="the engine's share leaves nothing for its KV cache",
            resource="engine",
            phase="launch",
            advice="Raise gpu_memory_utilization: it is the share of the GPU that the engine may fill, weights first.",
        ),
        Kind(
            name="engine_kv_too_small",
            title="the engine's KV cache cannot hold one sequence of the longest length",
            resource="engine",
            phase="launch",
            advice="Raise gpu_memory_utilization, or lower max_model_len (prompt + response).",
        ),
        Kind(
            name="sglang_static_too_small",
            title="SGLang's static share does not hold its weights and a KV cache",
            resource="engine",
            phase="launch",
            advice="Raise mem_fraction_static (verl: gpu_memory_utilization).",
        ),
        Kind(
            name="engine_profiling",
            title="the free memory of the GPU changed while the engine measured it",
            resource="engine",
            phase="launch",
            advice="Another process freed or took memory at the same time: start the engine alone, or once more.",
        ),
        Kind(
            name="expandable_segments",
            title="expandable segments and the engine's memory pool exclude each other",
            resource="none",
            phase="launch",
            advice="Not a lack of memory: take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF for this run.",
        ),
        Kind(
            name="xla_hbm",
            title="the program does not fit the HBM of a TPU core, says the XLA compiler",
            resource="gpu",
            advice="memfit plan --hardware v4-16 (or yours) says which values fit; --compile asks the compiler.",
        ),
        Kind(
            name="xla_oom",
            title="XLA is out of device memory",
            resource="gpu",
            advice="memfit plan says which values fit. On a GPU, XLA_PYTHON_CLIENT_MEM_FRACTION is the share that JAX takes.",
        ),
        Kind(name="ray_oom", title="Ray killed workers: the host is low on memory", resource="host", advice=_HOST),
        Kind(name="cgroup_oom", title="a container or job used up its memory limit", resource="host", advice=_HOST),
        Kind(
            name="host_oom",
            title="the kernel killed a process: the host is out of memory",
            resource="host",
            advice=_HOST,
        ),
        Kind(name="host_allocation", title="an allocation in host memory failed", resource="host", advice=_HOST),
        Kind(
            name="shm_full",
            title="shared memory (/dev/shm) is full",
            resource="shm",
            advice="Not the GPU: start the container with a larger --shm-size (or --ipc=host; on Kubernetes an emptyDir of "
            "medium Memory at /dev/shm), or use fewer data-loader workers.",
        ),
        Kind(name="disk_full", title="a disk is full", resource="disk", advice="Not a lack of memory: free the disk."),
        Kind(
            name="illegal_access",
            title="a kernel touched memory that is not its own",
            resource="none",
            advice="A bug of a kernel or an index, no lack of memory: CUDA_LAUNCH_BLOCKING=1 shows where.",
        ),
        Kind(
            name="nccl_timeout",
            title="a collective of NCCL timed out",
            resource="none",
            consequence=True,
            advice="No lack of memory by itself: one rank died or hung, and the others waited. Look at the first rank that "
            "said something else; its log may be another file.",
        ),
        Kind(
            name="sigkill",
            title="a process was killed (SIGKILL)",
            resource="host",
            consequence=True,
            advice="The log does not say who killed it. It is what the kernel does when host memory runs out: look for "
            "'Killed process' in dmesg, or for OOMKilled in the pod's status.",
        ),
        Kind(
            name="worker_died",
            title="a worker of Ray died without a word",
            resource="host",
            consequence=True,
            advice="Ray only guesses at the reason. Look for 'Killed process' in dmesg, and at the worker's own log.",
        ),
    )
}

"""How each kind of job is measured, in the process that it has for itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from measure.meter import limited, meter
from measure.table import Job
from tracer.case import Case

Result = dict[str, Any]
BUCKET_BYTES = 512 << 20


def run(job: Job, device: str) -> Result:
    """Measure one job in this process."""
    started = time.perf_counter()
    with limited(device, job.limit_bytes):
        result = KINDS[job.kind](job, device)
    return {**asdict(job), **result, "seconds": round(time.perf_counter() - started, 1)}


def case_of(job: Job) -> Case:
    """Return the job's case with the cross entropy that this machine has."""
    case = Case(**job.options)
    try:
        import flash_attn.ops.triton.cross_entropy  # noqa: F401
    except ImportError:
        return replace(case, log_prob="torch_v2")
    return case


# -- kinds of jobs --------------------------------------------------------------------------------------------------
def context(job: Job, device: str) -> Result:
    """What the driver counts and torch's allocator does not, after the first kernels and after a first collective."""
    if device != "cuda":
        return {"note": "a CPU has no context"}
    import pynvml
    import torch.distributed as dist

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + str(torch.cuda.get_device_properties(0).uuid))

    def outside() -> int:
        torch.cuda.synchronize()
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) - torch.cuda.memory_reserved()

    before = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    steps = {}
    a = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    steps["first tensor"] = outside() - before
    torch.nn.functional.scaled_dot_product_attention(
        *[(a @ a).view(1, 8, -1, 128)] * 3, is_causal=True
    ).sum().backward()
    steps["matrix product and attention"] = outside() - before
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    dist.all_reduce(a.detach())
    steps["one NCCL communicator of one rank"] = outside() - before
    dist.destroy_process_group()
    return {"outside_bytes": steps}


def training(job: Job, device: str) -> Result:
    """The phases of one step, predicted and measured."""
    from support.trainer_validation import predict
    from tracer.engine import session

    case, recorder = case_of(job), meter(device)
    with session(case, recorder, fake=False, device=device, stand_ins=False) as engine:
        with recorder:
            engine.run()
        measured = recorder.read()
    predicted = {} if case.model.startswith("toy") else predict(asdict(case))
    return {"case": asdict(case), "phases": measured, "predicted": predicted}


def moving(job: Job, device: str) -> Result:
    """Weights to the host and back by verl's own code, then handed over tensor by tensor through a bucket."""
    from verl.utils import fsdp_utils

    from tracer.engine import session

    case, recorder = case_of(job), meter(device)
    with session(case, recorder, fake=False, device=device, stand_ins=False) as engine, recorder:
        recorder.mark("setup")
        engine.load()
        engine.infer()
        recorder.mark("offload")
        fsdp_utils.offload_fsdp_model_to_cpu(engine.module)
        recorder.mark("onload")
        (fsdp_utils.load_fsdp_model_to_gpu if device == "cuda" else lambda _: None)(engine.module)
        recorder.mark("hand_over")
        hand_over(engine.module, device)
        recorder.mark("end")
    return {"case": asdict(case), "phases": recorder.read(), "bucket_bytes": BUCKET_BYTES}


def hand_over(module: Any, device: str) -> None:
    """Gather one parameter at a time, cast it and copy it into a bucket; a tensor above the bucket goes as it is."""
    bucket = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
    used = 0
    for parameter in module.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        flat = whole.detach().to(torch.bfloat16).flatten().view(torch.uint8)
        del whole
        if flat.numel() > BUCKET_BYTES:
            continue
        used = 0 if used + flat.numel() > BUCKET_BYTES else used
        bucket[used : used + flat.numel()].copy_(flat)
        used += flat.numel()


def lengths(job: Job, device: str) -> Result:
    """Steps whose micro-batches vary in length, below a limit: whether they survive, and what was reserved."""
    from tracer import process
    from tracer.allocator import CachingAllocator, OutOfMemory
    from tracer.engine import session

    case, recorder = replace(case_of(job), micro_batches=process.MICRO_BATCHES), meter(device)
    plan = list(process.acts(case, case.tokens, kind=job.lengths, offload=False))
    survived = True
    with session(case, recorder, fake=False, device=device, stand_ins=False) as engine, recorder:
        recorder.mark("setup")
        engine.load()
        recorder.mark("steps")
        try:
            play(engine, plan, device)
        except torch.OutOfMemoryError:
            survived = False
        recorder.mark("end")
    if device != "cuda":
        allocator = CachingAllocator(job.limit_bytes or 1 << 50, expandable=job.expandable)
        try:
            for index, change in recorder.log:
                if change > 0:
                    allocator.allocate(index, recorder.blocks[index].num_bytes)
                else:
                    allocator.release(index)
        except OutOfMemory:
            survived = False
    return {"case": asdict(case), "phases": recorder.read(), "survived": survived}


def play(engine: Any, plan: list[Any], device: str) -> None:
    """Let a real engine do what a plan of the allocator's model says."""
    for index, act in enumerate(plan):
        if act.name in ("forward", "first", "next"):
            engine.resize(act.tokens)
            following = plan[index + 1].name if index + 1 < len(plan) else ""
            engine.forward_only() if act.name == "forward" else engine.micro_batch(last=following != "next")
        elif act.name == "step":
            engine.clip_and_step(engine.optimizer)
        elif act.name == "empty_cache" and device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def generation(job: Job, device: str) -> Result:
    """Hugging Face generate, predicted and measured."""
    from hydra_plugins.memfit.memory.generation import peak
    from support import generation_tracer as tracer
    from support.generation_specs import call, spec

    case, recorder = tracer.Case(**job.options), meter(device)
    with torch.device(device), torch.no_grad(), recorder:
        recorder.mark("setup")
        model = tracer._build(case)
        for tensor in (*model.parameters(), *model.buffers()):
            recorder.label(tensor, "weights")
        recorder.mark("generate")
        vocabulary = model.config.vocab_size
        ids = torch.randint(3, vocabulary, (case.rows, case.prompt))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new, min_new_tokens=case.new,
            do_sample=case.do_sample, top_k=case.top_k, top_p=case.top_p, pad_token_id=0,
        )  # fmt: skip
        recorder.mark("end")
        parameters = sum(p.numel() for p in model.parameters())
    predicted = peak(spec(case.model, parameters), call(asdict(case))).total_bytes
    return {"case": asdict(case), "phases": recorder.read(), "predicted": {"generate": predicted}}


KINDS: dict[str, Callable[[Job, str], Result]] = {
    "context": context,
    "training": training,
    "moving": moving,
    "lengths": lengths,
    "generation": generation,
}

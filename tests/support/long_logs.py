"""Long logs, and how fast they are read: ``python -m support.long_logs`` prints it (run with ``PYTHONPATH=tests``).

Three logs: training as usual with a failure at its end; the same with every line from a traceback; failures alone, the worst
case. CPU time of one process, the best of three.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from hydra_plugins.memfit.diagnosis.scan import scan
from hydra_plugins.memfit.diagnosis.stream import open_log

USUAL = (
    b"\x1b[36m(TaskRunner pid=7773)\x1b[0m step:%d - global_seqlen/min:11032.000 - actor/entropy:0.331 - actor/pg_loss:-0.012 - "
    b"perf/max_memory_allocated_gb:61.22 - timing_s/update_actor:31.22 - response_length/mean:1031.220\n"
    b"\x1b[36m(WorkerDict pid=118271)\x1b[0m After vllm offload in sharding manager: 13.54 GB / 79.19 GB.\n"
    b"Processed prompts:  97%%|#########6| 1240/1280 [00:10<00:00, 693.22it/s]\rProcessed prompts: 100%%|##########| 1280/1280\n"
)
FRAME = b'(WorkerDict pid=118271)   File "/verl/verl/workers/fsdp_workers.py", line 504, in update_actor\n'
FAILURE = (
    b"(WorkerDict pid=118271) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.12 GiB. GPU 0 has a total capacity "
    b"of 79.19 GiB of which 2.11 GiB is free. Including non-PyTorch memory, this process has 77.00 GiB memory in use. Of the "
    b"allocated memory 71.00 GiB is allocated by PyTorch, and 3.01 GiB is reserved by PyTorch but unallocated.\n"
)


def write_log(path: Path, num_bytes: int, body: bytes = USUAL) -> None:
    """Write a log of about ``num_bytes`` that begins and ends with a failure."""
    with path.open("wb") as file:
        file.write(FAILURE)
        step = 0
        while file.tell() < num_bytes:
            part = b"".join(body % (step + i) if b"%d" in body else body for i in range(1000))
            file.write(part)
            step += 1000
        file.write(FRAME + FAILURE)


def megabytes_per_second(path: Path) -> float:
    """Return how fast the log is scanned, by CPU time."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        with open_log(str(path)) as file:
            scan(file)
        best = min(best, time.process_time() - start)
    return path.stat().st_size / 1e6 / best


def main() -> None:
    """Print a table of Markdown."""
    print("| log | MB | MB per CPU second |", "|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, body, size in (
            ("training as usual", USUAL, 200),
            ("frames alone", FRAME, 20),
            ("failures alone", FAILURE, 20),
        ):
            path = Path(folder) / "log"
            write_log(path, size * 10**6, body)
            print(f"| {name} | {path.stat().st_size / 1e6:.0f} | {megabytes_per_second(path):.0f} |")


if __name__ == "__main__":
    sys.exit(main())

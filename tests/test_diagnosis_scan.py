"""What is read in a log: causes before consequences, ranks merged, attempts told apart, odd files survived."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from hydra_plugins.memfit.diagnosis.line import clean
from hydra_plugins.memfit.diagnosis.phases import Frame, phase_of
from hydra_plugins.memfit.diagnosis.scan import Scan, scan
from hydra_plugins.memfit.diagnosis.stream import BLOCK_BYTES, open_log
from support.long_logs import write_log

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 8.85 GiB is free."
)
TIMEOUT = (
    "[rank1]:[E321 02:07:08.408 ProcessGroupNCCL.cpp:607] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600060 milliseconds"
)
COMMAND = "+ python3 -m verl.trainer.main_ppo data.train_batch_size=64"


def read(*lines: str | bytes, end: bytes = b"\n") -> Scan:
    """Return the scan of a log of these lines."""
    return scan(io.BytesIO(b"".join((line if isinstance(line, bytes) else line.encode()) + end for line in lines)))


def oom(asked: float = 13.91, prefix: str = "") -> str:
    """Return torch's message."""
    return prefix + OOM.format(asked=asked)


def kinds(result: Scan) -> list[str]:
    """Return the kinds of all findings."""
    return [finding.kind.name for finding in result.findings]


def test_a_consequence_is_not_the_cause() -> None:
    """Ranks that waited for the one that died time out before its message is printed; still it is the cause."""
    result = read(TIMEOUT, oom())
    assert kinds(result) == ["nccl_timeout", "gpu_oom"]
    assert result.cause is not None and result.cause.kind.name == "gpu_oom"


def test_a_consequence_alone_is_told() -> None:
    """A log that shows the time-out only is told as that."""
    result = read(TIMEOUT)
    assert result.cause is not None and result.cause.kind.name == "nccl_timeout"


def test_ranks_that_say_the_same_are_one_finding() -> None:
    """The failure of eight ranks is one, with all of them; Ray's count of hidden repetitions is added."""
    lines = [oom(13 + rank / 10, f"(WorkerDict pid={rank}) ") for rank in range(1, 8)]
    result = read(*lines, oom(13, "(WorkerDict pid=8) ") + " [repeated 9x across cluster]")
    [finding] = result.findings
    assert (len(finding.processes), finding.messages, finding.line) == (8, 16, 1)
    assert finding.amounts["asked"].num_bytes == round(13.1 * 2**30)


def test_failures_of_two_phases_are_two_findings() -> None:
    """The same message in another phase is another failure; the first one is the cause."""
    frames = ['  File "w.py", line 1, in compute_log_prob', '  File "w.py", line 1, in update_actor']
    result = read(frames[0], oom(), "Traceback (most recent call last):", frames[1], oom(2.0))
    assert [finding.phase for finding in result.findings] == ["old_log_prob", "update_actor"]


def test_interleaved_tracebacks_are_kept_apart() -> None:
    """Frames belong to the process that printed them."""
    result = read(
        '(WorkerDict pid=1)   File "w.py", line 1, in compute_log_prob',
        '(WorkerDict pid=2)   File "w.py", line 1, in update_actor',
        oom(prefix="(WorkerDict pid=1) "),
    )
    assert result.cause is not None and result.cause.phase == "old_log_prob"


def test_the_last_attempt_counts() -> None:
    """A log may hold several launches; the last one that failed is told, with its own launch."""
    result = read(COMMAND, oom(1.0), COMMAND + " a=1", oom(2.0), COMMAND + " a=2", "all is well")
    assert result.cause is not None and result.cause.amounts["asked"].num_bytes == 2 << 30
    assert result.runs == 2
    assert result.launch is not None and result.launch.command.endswith("a=1")


def test_the_training_step_is_told() -> None:
    """verl prints the step in front of its metrics; the block with them may be far from the failure."""
    result = read("step:41 - actor/entropy:0.3 - x:1", *["." * 200] * 4000, oom())
    assert result.cause is not None and result.cause.step == 41


def test_a_config_that_verl_prints_is_read() -> None:
    """The pretty-printed config of the driver is a literal; other processes print in between."""
    result = read(
        "(TaskRunner pid=7) {'actor_rollout_ref': {'actor': {'checkpoint': {'contents': ['model',",
        "(WorkerDict pid=8) {'not': 'a part of it'}",
        "(TaskRunner pid=7)                                              'extra']},",
        "(TaskRunner pid=7)                                  'ppo_mini_batch_size': 64}},",
        "(TaskRunner pid=7)  'data': {'chat': 'a } that does not count', 'train_batch_size': 256}}",
        oom(),
    )
    assert result.launch is not None and result.launch.config == {
        "actor_rollout_ref": {"actor": {"checkpoint": {"contents": ["model", "extra"]}, "ppo_mini_batch_size": 64}},
        "data": {"chat": "a } that does not count", "train_batch_size": 256},
    }


@pytest.mark.parametrize(
    "text",
    [
        "{'actor_rollout_ref': {__import__('os').system('true'): 1}}",
        "{'actor_rollout_ref': {" + "[" * 5000 + "]" * 5000 + "}}",
        "{'actor_rollout_ref': {'a': 1}, 2: 3}",
    ],
)
def test_a_config_that_is_no_literal_is_not_read(text: str) -> None:
    """What a log holds is never evaluated."""
    assert read(text).launch is None


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        ("++ A=1 python3 -m verl.trainer.main_ppo a.b=1 2>&1", "A=1 python3 -m verl.trainer.main_ppo a.b=1 2>&1", ()),
        ("Error executing job with overrides: ['a=1', '+b=2']", "", ("a=1", "+b=2")),
    ],
)
def test_a_command_line_is_read(text: str, command: str, words: tuple[str, ...]) -> None:
    """The line that ``set -x`` prints is kept whole; Hydra's list are words."""
    launch = read(text).launch
    assert launch is not None and (launch.command, launch.words) == (command, words)


@pytest.mark.parametrize(
    ("raw", "text", "process"),
    [
        ("\x1b[36m(WorkerDict pid=12, ip=10.0.0.1)\x1b[0m   File", "  File", "WorkerDict pid=12, ip=10.0.0.1"),
        ("(raylet, ip=10.0.0.1) x", "x", ""),
        ("[rank3]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] x", "x", "rank 3"),
        ("7: [rank7]: x", "x", "rank 7"),
        ("vllm-1  | ERROR 11-18 18:07:28 engine.py:366] x", "x", ""),
        ("[2025-03-29 18:18:34 TP0] x", "x", ""),
        (
            "2023-12-22T00:21:35.318928Z (EngineCore_DP0 pid=1) ERROR 10-25 13:08:43 [core.py:708] x",
            "x",
            "EngineCore_DP0 pid=1",
        ),
        ("W0227 17:39:41.936000 293814 site-packages/torch/elastic/api.py:766] x", "x", ""),
    ],
)
def test_prefixes_are_taken_off(raw: str, text: str, process: str) -> None:
    """Colours, Ray, torchrun, Slurm, compose files and loggers put something in front of what was said."""
    line = clean(raw.encode(), 1)
    assert (line.text, line.process) == (text, process)


@pytest.mark.parametrize(
    ("places", "phase"),
    [
        (["ray_trainer.py:fit", "fsdp_workers.py:update_actor", "dp_actor.py:update_policy"], "update_actor"),
        (
            ["fsdp_workers.py:update_actor", "dp_actor.py:_optimizer_step", "torch/optim/adamw.py:step"],
            "optimizer_step",
        ),
        (["fsdp_workers.py:update_critic", "dp_critic.py:_optimizer_step"], "update_critic"),
        (["fsdp_workers.py:compute_ref_log_prob", "dp_actor.py:compute_log_prob"], "ref_log_prob"),
        (["engine_workers.py:compute_log_prob", "base.py:infer_batch"], "old_log_prob"),
        (["ray_trainer.py:_compute_old_log_prob"], "old_log_prob"),
        (["fsdp_workers.py:generate_sequences", "fsdp_workers.py:rollout_mode"], "weight_sync"),
        (["fsdp_workers.py:rollout_mode", "vllm_rollout.py:resume", "cumem.py:wake_up"], "kv_resume"),
        (["fsdp_workers.py:generate_sequences", "gpu_model_runner.py:execute_model"], "rollout"),
        (["fsdp_workers.py:init_model", "gpu_worker.py:determine_available_memory", "x.py:execute_model"], "launch"),
        (["areal/trainer/ppo/actor.py:ppo_update", "areal/engine/fsdp_engine.py:train_batch"], "update_actor"),
        (["areal/trainer/ppo/critic.py:ppo_update", "areal/engine/fsdp_engine.py:train_batch"], "update_critic"),
        (["areal/trainer/ppo/actor.py:compute_logp", "areal/engine/fsdp_engine.py:forward_batch"], "old_log_prob"),
        (["areal/engine/fsdp_engine.py:update_weights"], "weight_sync"),
        (["areal/engine/fsdp_engine.py:initialize"], "launch"),
        (["ray:actor_rollout_ref_compute_ref_log_prob"], "ref_log_prob"),
        (["ray:critic_compute_values"], "values"),
        (["main.py:run"], None),
    ],
)
def test_functions_tell_the_phase(places: list[str], phase: str | None) -> None:
    """The most specific function of a traceback decides; the names are those of verl 0.4 to 0.9, AReaL and the engines."""
    frames = [Frame(file=place.rpartition(":")[0], function=place.rpartition(":")[2]) for place in places]
    assert phase_of(frames) == phase


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\x00\xff\xfe" * 1000,
        bytes(range(256)) * 50,
        b"\x1b[" * 5000,
        b"(" * 50_000,
        b'File "' * 50_000,
        b"CUDA out of memory. Tried to allocate " * 20_000,
        b"Error executing job with overrides: [" * 3000,
    ],
    ids=["empty", "newline", "binary", "bytes", "escapes", "parentheses", "frames", "needles", "overrides"],
)
def test_odd_bytes_are_survived(data: bytes) -> None:
    """A log may hold anything; what is no message is no finding."""
    result = scan(io.BytesIO(data))
    assert [finding for finding in result.findings if finding.amounts] == []
    assert result.num_bytes >= len(data)


@pytest.mark.parametrize("offset", [0, 100, BLOCK_BYTES - 60, BLOCK_BYTES, 5 * BLOCK_BYTES + 7])
def test_a_message_in_an_endless_line_is_found(offset: int) -> None:
    """A line of megabytes is cut into pieces that overlap; the message in it is read wherever it stands."""
    data = b"x" * offset + b" " + oom().encode() + b" " + b"y" * 2 * BLOCK_BYTES
    cause = scan(io.BytesIO(data)).cause
    assert cause is not None and cause.amounts["free"].num_bytes == round(8.85 * 2**30)


def test_progress_bars_end_lines() -> None:
    """A progress bar ends its lines with a carriage return; what stands behind the last one is a line."""
    result = read(b"Training:  1%\rTraining:  2%\r" + oom().encode())
    assert kinds(result) == ["gpu_oom"]


def test_lines_are_counted() -> None:
    """Line numbers are those that an editor shows, over many blocks."""
    result = read(*["." * 99] * 9999, oom(), "end")
    assert result.cause is not None and (result.cause.line, result.num_lines) == (10_000, 10_001)


@pytest.mark.parametrize(
    ("cut", "damaged", "note"),
    [(None, False, ""), (-30, False, "breaks off"), (None, True, "could not be read to its end")],
)
def test_gzip_files_are_read_as_far_as_they_go(tmp_path: Path, cut: int | None, damaged: bool, note: str) -> None:
    """A log that is still being packed, or was damaged, is read up to there, and that is said."""
    noise = Random(0).randbytes(200_000)
    packed = gzip.compress(oom().encode() + b"\n" + noise)
    if damaged:
        packed = packed[:-100_000] + b"\x00" * 99_990 + packed[-10:]
    path = tmp_path / "log.gz"
    path.write_bytes(packed[:cut])
    with open_log(str(path)) as file:
        result = scan(file)
    assert result.findings or damaged
    assert note in " ".join(result.notes) and bool(note) == bool(result.notes)


@pytest.mark.slow
def test_a_long_log_takes_little_memory(tmp_path: Path) -> None:
    """200 MB with failures at both ends take less than 60 MiB more than an empty log does."""
    path, empty = tmp_path / "long.log", tmp_path / "empty.log"
    write_log(path, 200 * 10**6)
    empty.write_bytes(b"")
    assert _peak(path) - _peak(empty) < 60 << 20


def _peak(path: Path) -> int:
    """Return the largest resident set of a process that scans the log, in bytes."""
    code = (
        "import sys, resource\n"
        "from hydra_plugins.memfit.diagnosis.scan import scan\n"
        "from hydra_plugins.memfit.diagnosis.stream import open_log\n"
        "with open_log(sys.argv[1]) as file: scan(file)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, timeout=300
    )
    return int(done.stdout) * 1024


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("torch.AcceleratorError: CUDA error: out of memory", "gpu_oom"),
        ("RuntimeError: CUDA driver error: out of memory", "gpu_oom"),
        ("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity; 55.00 GiB already allocated; "
         "55.00 GiB current active; 1.50 GiB free; 58.00 GiB reserved in total by PyTorch)", "gpu_oom"),
        ("DistBackendError: ... Last error: Cuda failure 2 'out of memory'", "nccl_oom"),
        ("[torch_memory_saver.cpp] CUresult error: 2 (out of memory)", "engine_wake_oom"),
        ("AssertionError: Error in memory profiling. Initial free memory 70.1 GiB, current free memory 72.3 GiB.",
         "engine_profiling"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
         "to allocate 12884901888 bytes. Error code 12 (Cannot allocate memory)", "host_allocation"),
        ("OSError: [Errno 12] Cannot allocate memory", "host_allocation"),
        ("OSError: [Errno 28] No space left on device: '/ckpt/step_10'", "disk_full"),
        ("RuntimeError: unable to allocate shared memory(shm) for file </torch_12_34_0>: No space left on device (28)",
         "shm_full"),
        ("System memory low at node with IP 10.0.0.1. Used memory (23.63GB) / total capacity (33.28GB) (0.709971) exceeds",
         "ray_oom"),
        ("    reason: OOMKilled", "cgroup_oom"),
        ("command terminated with exit code 137", "sigkill"),
        ("traceback : Signal 9 (SIGKILL) received by PID 10398", "sigkill"),
        ("Killed", "sigkill"),
    ],
)  # fmt: skip
def test_other_wordings_are_recognised(text: str, kind: str) -> None:
    """Wordings of torch, its back ends, NCCL, vLLM, Ray, the shell and Kubernetes that no log of the index has."""
    assert kinds(read(text)) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "(raylet) 0 Workers (tasks / actors) killed due to memory pressure (OOM), 1 Workers crashed due to other reasons",
        '"OOMKilled": false,',
        "exitcode: 0, Killed 3 stale processes, exit code 13",
        "a chunk of 8 sequences ran out of memory; going on with 4 at once",
        "If reserved but unallocated memory is large try setting max_split_size_mb to avoid fragmentation",
        "step:137 - shared memory 3 GB, expandable_segments:True",
    ],
)
def test_what_sounds_alike_is_no_failure(text: str) -> None:
    """Words of failures stand in healthy logs, too."""
    assert kinds(read(text)) == []

"""What goes wrong around a launch: full disks, damaged caches, kills, drivers that vanish. A plan or one clear error."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected, MemfitError
from hydra_plugins.memfit.base.files import cache_dir, write_whole
from hydra_plugins.memfit.compose.handover import VARIABLE, hardware_of
from hydra_plugins.memfit.hardware import nvml
from hydra_plugins.memfit.model.download import cached_path
from hydra_plugins.memfit.model.resolve import resolve_model
from support.fake_driver import H100, H200, Driver, Gpu
from support.hydra_app import LAUNCH, ROOT, run, write_app

HUB_ID = "someone/a-model"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
AUTO = {"name": "auto"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the script of an application with verl's config."""
    return write_app(tmp_path_factory.mktemp("app"))


def parts(folder: Path) -> list[Path]:
    """Return what an unfinished write left."""
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


# Writing


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    """A write that the disk refuses in the middle leaves the old content, and no piece of the new one."""
    target = tmp_path / "deep" / "kept.json"
    write_whole(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_whole(target, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)

    assert target.read_bytes() == b"old"
    assert parts(tmp_path) == []


WRITER = (
    "import sys; from pathlib import Path; from hydra_plugins.memfit.base.files import write_whole\n"
    "path, mark, count = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])\n"
    "print('ready', flush=True)\n"
    "for _ in range(count): write_whole(path, mark * 200_000)"
)


def writer(target: Path, mark: str, count: int) -> subprocess.Popen[str]:
    """Start a process that writes one file again and again."""
    command = [sys.executable, "-c", WRITER, str(target), mark, str(count)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def test_a_kill_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    """SIGKILL and SIGINT while a file is written over and over: what stands there is one of its versions."""
    target = tmp_path / "kept.json"
    write_whole(target, b"a" * 200_000)
    for signal_number in (signal.SIGKILL, signal.SIGINT):
        process = writer(target, "b", 1_000_000)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal_number)
        process.communicate(timeout=10)

        content = target.read_bytes()
        assert content in (b"a" * 200_000, b"b" * 200_000)


@pytest.mark.slow
def test_sixty_four_writers_leave_one_whole_file(tmp_path: Path) -> None:
    """The ranks of a launch keep the same file at the same time: each reads a whole one, whoever was last."""
    target = tmp_path / "kept.json"
    children = []
    for number in range(64):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(5):
                    write_whole(target, bytes([number]) * 100_000)
                    content = target.read_bytes()
                    assert len(content) == 100_000 and len(set(content)) == 1
                code = 0
            finally:
                os._exit(code)
        children.append(child)

    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 64
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


# The cache of config.json


BROKEN: list[tuple[str, Callable[[Path], object]]] = [
    ("empty", lambda path: path.write_bytes(b"")),
    ("half", lambda path: path.write_text('{"model_type": "qw')),
    ("not a mapping", lambda path: path.write_text("[1, 2]")),
    ("a folder", lambda path: path.mkdir()),
    ("a link in a circle", lambda path: path.symlink_to(path)),
    ("a device without end", lambda path: path.symlink_to("/dev/zero")),
    ("text of another encoding", lambda path: path.write_bytes(b"\xff\xfe{}")),
]


@pytest.mark.parametrize("damage", [row[1] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_damaged_cache_is_passed_over(damage: Callable[[Path], object], tmp_path: Path) -> None:
    """What cannot be read in the cache is fetched anew; offline, the error says that there is no download."""
    environ = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    kept = cached_path(HUB_ID, environ)
    kept.parent.mkdir(parents=True)
    damage(kept)

    with pytest.raises(MemfitError, match="HF_HUB_OFFLINE is set"):
        resolve_model(HUB_ID, environ=environ)


@pytest.mark.parametrize("root", ["/dev/null", "/proc", "/" + "a" * 300, "/dev/full/x"])
def test_a_cache_that_cannot_be_one(root: str, tmp_path: Path) -> None:
    """A cache directory that is a device, not writable or impossible costs the download, and nothing else."""
    environ = {"XDG_CACHE_HOME": root, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    with pytest.raises(MemfitError, match="HF_HUB_OFFLINE is set"):
        resolve_model(HUB_ID, environ=environ)


def test_a_user_without_a_home() -> None:
    """A container's user without HOME and without an entry in the system's table keeps nothing, and plans."""
    if os.getuid() != 0:
        pytest.skip("only root can become a user that does not exist")
    program = "import os; from hydra_plugins.memfit.base.files import cache_dir; os.setuid(54321); print(cache_dir({}))"
    environ = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "/dev/null/.cache/memfit", done.stderr
    assert cache_dir({"HOME": "/home/me"}) == Path("/home/me/.cache/memfit")


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    """A whole file in the cache answers offline."""
    environ = {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    write_whole(cached_path(HUB_ID, environ), json.dumps(CONFIG).encode())

    assert resolve_model(HUB_ID, environ=environ).hidden_size == 896


# A launch


@pytest.mark.slow
def test_a_full_disk_stops_no_plan(app: Path, tmp_path: Path) -> None:
    """Where the record cannot be written, one line says so and the job has its plan."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "memfit.json").mkdir()  # what stands in the way of the record is in nobody else's

    ran = run(
        [app, *LAUNCH, "+hardware=h200", "memfit.report=off", f"hydra.run.dir={tmp_path}", "hydra.output_subdir=taken"]
    )

    assert ran.code == 0, ran.err
    (job,) = ran.jobs
    assert job["MEMFIT_PLAN"] == ""
    assert ran.err.count("the record of the plan was not written") == 1
    assert "Traceback" not in ran.err
    assert parts(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["/dev/full", "closed"])
def test_nobody_to_report_to(app: Path, tmp_path: Path, stream: str) -> None:
    """A stderr that takes nothing, or is closed, does not stop a launch."""
    words = [sys.executable, str(app), *LAUNCH, "+hardware=h200", f"hydra.run.dir={tmp_path}"]
    redirect = "2>&-" if stream == "closed" else f"2>{stream}"
    command = " ".join(f"'{word}'" for word in words) + f" {redirect}"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    done = subprocess.run(
        ["bash", "-c", command], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0
    assert "JOB " in done.stdout


@pytest.mark.slow
def test_an_interrupt_is_no_plan_and_no_traceback_of_ours(tmp_path: Path) -> None:
    """Ctrl-C while the driver hangs ends the launch at once, with the helper process."""
    driver = Driver(gpus=(H200,), extra=("hang=nvmlInitWithFlags",))
    environ = {**driver.environ(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "hydra_plugins.memfit.cli.main", "detect"],
        env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=20)

    assert process.returncode == 130
    assert time.monotonic() - started < 5
    assert "Traceback" not in err


# The hardware changes under a launch


def test_ranks_plan_with_what_the_first_read(tmp_path: Path) -> None:
    """The launcher's GPU was empty; at a rank it is held by others, another model, or gone: the same reading counts."""
    environ = Driver(gpus=(H200, H200)).environ(tmp_path)
    first = hardware_of(AUTO, frozenset(), environ)
    changes = (
        Driver(gpus=(replace(H200, used=100_000), H200)),
        Driver(gpus=(H100,)),
        Driver(gpus=()),
        Driver(gpus=(H200,), extra=("fail=nvmlInitWithFlags:9",)),
    )
    for number, driver in enumerate(changes):
        folder = tmp_path / str(number)
        folder.mkdir()
        later = {**driver.environ(folder), VARIABLE: environ[VARIABLE]}

        assert hardware_of(AUTO, frozenset(), later) == first


@pytest.mark.parametrize(
    ("later", "says"),
    [
        (Driver(gpus=()), "no GPU|no NVIDIA|not"),
        (Driver(gpus=(H200,), extra=("fail=nvmlDeviceGetHandleByIndex_v2:15",)), "lost|nvmlDeviceGetHandleByIndex"),
        (Driver(gpus=(H200,), extra=("fail=nvmlInitWithFlags:9",)), "driver|nvmlInit"),
    ],
    ids=["no GPU left", "a GPU that was lost", "a driver that was unloaded"],
)
def test_a_driver_that_vanishes_between_two_launches(later: Driver, says: str, tmp_path: Path) -> None:
    """A launch after it reads anew, and says what is wrong; the answer of before is not taken."""
    assert nvml.detect(Driver(gpus=(H200,)).environ(tmp_path)).name == "h200"

    with pytest.raises(HardwareNotDetected, match=says):
        nvml.detect(later.environ(tmp_path))


def test_mig_switched_on_and_off(tmp_path: Path) -> None:
    """Each launch plans with what is there: the whole GPU, a slice of it, and the whole again."""
    part = Gpu(name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", total=40448, reserved=20, uuid="MIG-1")
    cut = replace(H100, extra=("ecc=1",), slices=(part,))
    sizes = [nvml.detect(Driver(gpus=(gpu,)).environ(tmp_path)).capacity_bytes >> 30 for gpu in (H100, cut, H100)]

    assert sizes[0] == sizes[2] > 70
    assert 38 <= sizes[1] <= 40


@pytest.mark.slow
def test_a_gpu_full_of_others(app: Path, tmp_path: Path) -> None:
    """On a GPU that other processes fill nothing fits: a refusal with the sizes, before any job starts."""
    environ = Driver(gpus=(replace(H200, used=140_000),)).environ(tmp_path)

    ran = run([app, *LAUNCH, "+hardware=auto", f"hydra.run.dir={tmp_path / 'run'}"], environ=environ)

    assert (ran.code, ran.jobs) == (1, [])
    assert "no plan fits" in ran.err
    assert "Traceback" not in ran.err

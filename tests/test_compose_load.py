"""Many jobs, many ranks: the thousandth plan costs what the first did, and all processes of a launch agree."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from support import fuzz
from support.fuzz import Case
from support.hydra_app import LAUNCH, ROOT, write_app

pytestmark = pytest.mark.slow

MIB = 1 << 20
SETTINGS = (
    "memfit: {framework: jax, mapping: {micro_batch_size: per_device, tokens: length, accumulation_steps: steps}}\n"
)
SMALL = {
    "config": "defaults: [hardware: v5e-8, model: qwen2.5-0.5b, _self_]\nper_device: 8\nlength: 1024\nsteps: 1\n"
    + SETTINGS,
}
"""A launch whose config is small, so that what is measured is memfit and not the reading of a large config."""
TIMED = """\
import time
import hydra

last = [time.process_time()]

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    now = time.process_time()
    print("JOB", now - last[0], cfg.per_device, cfg.steps)
    last[0] = time.process_time()

main()
"""


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_small(folder: Path) -> Path:
    """Write the small application to ``folder``."""
    (folder / "conf").mkdir(parents=True)
    for name, text in SMALL.items():
        (folder / "conf" / f"{name}.yaml").write_text(text)
    (folder / "app.py").write_text(TIMED)
    return folder / "app.py"


def test_a_sweep_of_a_thousand_jobs(tmp_path: Path) -> None:
    """Hydra's own launcher, one process: the last jobs cost what the first did. (It keeps the config of every job.)"""
    script = write_small(tmp_path)
    words = [
        "-m",
        "length=range(24,1024)",
        "memfit.report=off",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={tmp_path}/out",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *words], env=environ, capture_output=True, text=True, timeout=800
    )

    jobs = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("JOB ")]
    assert (done.returncode, len(jobs)) == (0, 1000), done.stderr[-2000:]
    seconds = [float(job[0]) for job in jobs]
    early, late = statistics.median(seconds[50:250]), statistics.median(seconds[-200:])
    print(f"a job: {1e3 * early:.1f} ms early, {1e3 * late:.1f} ms late")
    assert late <= 1.5 * early
    assert all(int(job[1]) * int(job[2]) >= 8 for job in jobs)
    assert {job[1] for job in jobs} > {"8"}  # the longest sequences need smaller micro-batches


def test_a_thousand_plans_in_one_process() -> None:
    """1,000 different launches of every framework leave nothing behind: no object of the process is one more for each."""
    bases = [Case(base=base) for base in fuzz.BASES]
    for case in bases:
        fuzz.answer(case)
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    for number in range(1000):
        case = bases[number % len(bases)]
        capacity = (("hardware.capacity_bytes", (40 << 30) + number * MIB),)
        fuzz.answer(Case(base=case.base, settings=capacity))
    gc.collect()

    print(f"1,000 plans: memory grew by {(resident() - before) / MIB:.1f} MiB")
    assert len(gc.get_objects()) - objects < 500
    assert resident() - before <= 16 * MIB


def test_sixty_four_ranks_agree(tmp_path: Path) -> None:
    """64 processes of one machine compose the same launch at once, and get the same bytes."""
    conf = write_small(tmp_path).parent / "conf"
    readers = []
    for _ in range(64):
        reader, writer = os.pipe()
        if os.fork() == 0:
            code = 1
            try:
                os.write(writer, _composed(conf).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        readers.append(reader)

    plans = [os.fdopen(reader).read() for reader in readers]
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(64)]
    assert codes == [0] * 64
    assert len(set(plans)) == 1
    assert json.loads(plans[0]) == {"per_device": 4, "length": 1024, "steps": 2}


def _composed(conf: Path) -> str:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return json.dumps(dict(compose("config", ["memfit.report=off"])))


PEAK = """\
import sys
from hydra import compose, initialize_config_dir
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    compose("config", sys.argv[2:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def test_the_planner_needs_little_memory(tmp_path: Path) -> None:
    """The peak of a process that composes verl's config with a plan and its report is at most 50 MiB above without."""
    conf = write_app(tmp_path).parent / "conf"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def peak(*words: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", PEAK, str(conf), *LAUNCH, *words]
        return int(subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120).stdout) << 10

    without, planned = peak(), peak("+hardware=h200")
    print(f"peak memory: {without / MIB:.1f} MiB without a plan, {planned / MIB:.1f} MiB with one")
    assert planned - without <= 50 * MIB

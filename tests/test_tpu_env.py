"""``memfit env``: export lines that are safe to evaluate, or a line that makes the evaluation fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.cli.env import exports

NASTY = '$(touch owned) `id` "q" \\ ${HOME}'
ROOT = Path(__file__).resolve().parents[1]
SWEEP = ["BATCH_SIZE=1", "NUM_PRE_Q=8", "GLOBAL_LENGTH=2048", "MAX_LENGTH_SAMPLE=64"]
MODEL = ["MODEL_PATH=Qwen/Qwen2.5-7B-Instruct"]


def memfit(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``memfit env`` in a process of its own."""
    own = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "hydra_plugins.memfit.cli.main", "env", "--hardware", "v4-16", *words]
    return subprocess.run(command, capture_output=True, text=True, env=own | environ, timeout=60, check=False)


def evaluated(script: str, names: list[str]) -> dict[str, str]:
    """Return what a shell has in these variables after ``eval`` of the script."""
    show = "".join(f'printf "%s\\0" "${name}"; ' for name in names)
    done = subprocess.run(["sh", "-c", f'eval "$1"; {show}', "sh", script], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split("\0"), strict=False))


def test_a_fitting_launch_is_exported_as_it_was_asked_for() -> None:
    """What fits is printed unchanged, the report goes to stderr."""
    done = memfit(*MODEL, "BATCH_SIZE=1", "NUM_PRE_Q=4", *SWEEP[2:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"export {word}" for word in (*MODEL, "BATCH_SIZE=1", "NUM_PRE_Q=4", *SWEEP[2:])
    ]
    assert "train_step" in done.stderr


def test_micro_batch_is_planned_where_the_runner_has_one() -> None:
    """With TRAIN_MICRO_BATCH_SIZE the plan splits the batch and keeps NUM_PRE_Q."""
    done = memfit(*MODEL, *SWEEP, "TRAIN_MICRO_BATCH_SIZE=8")
    assert done.returncode == 0, done.stderr
    found = evaluated(done.stdout, ["NUM_PRE_Q", "TRAIN_MICRO_BATCH_SIZE"])
    assert found == {"NUM_PRE_Q": "8", "TRAIN_MICRO_BATCH_SIZE": "4"}


def test_no_plan_makes_the_evaluation_fail() -> None:
    """Where nothing fits the exit status is 3, and eval of the output is false: `set -e` and && stop."""
    done = memfit(*MODEL, *SWEEP)
    assert done.returncode == 3
    assert done.stdout == "false\n"
    assert "NUM_PRE_Q=4" in done.stderr
    assert subprocess.run(["sh", "-c", f"eval '{done.stdout}' && echo started"], check=False).returncode != 0


@pytest.mark.parametrize(
    "value", ["a b", "x'; touch owned; '", NASTY, "1,-1,1", "-n", "*", "", "two\nlines", 8, 0.5, True]
)
def test_values_survive_the_shell(value: object, tmp_path: Path) -> None:
    """Whatever a value holds, eval gives it back letter by letter and runs nothing."""
    script = f"cd {tmp_path}\n" + "\n".join(exports({"WANDB_NAME": value}))
    expected = str(value).lower() if isinstance(value, bool) else str(value)
    assert evaluated(script, ["WANDB_NAME"]) == {"WANDB_NAME": expected}
    assert not (tmp_path / "owned").exists()


def test_nasty_values_pass_the_command_line_whole() -> None:
    """Text that Hydra's grammar would read otherwise (quotes, commas, braces) arrives as it was typed."""
    words = [f"WANDB_NAME={NASTY}", "WANDB_PROJECT=[a]{b:c}", "MESH_SHAPE_FSDP=1,-1,1"]
    done = memfit(*MODEL, "BATCH_SIZE=1", "NUM_PRE_Q=4", *words)
    assert done.returncode == 0, done.stderr
    names = [word.partition("=")[0] for word in words]
    assert evaluated(done.stdout, names) == dict(word.split("=", 1) for word in words)


def test_only_variables_are_exported() -> None:
    """A dotted key cannot be exported: the message names the command that serves it."""
    with pytest.raises(ConfigError, match="Use memfit plan"):
        exports({"rollout.n": 8})


def test_variables_of_the_shell_count() -> None:
    """A variable that is exported already is part of the launch."""
    done = memfit(*MODEL, "BATCH_SIZE=1", *SWEEP[2:], NUM_PRE_Q="8")
    assert done.returncode == 3


def test_misspelt_variable_is_an_error() -> None:
    """A variable that the runner does not read is an error, exit 2, and not silently exported."""
    done = memfit(*MODEL, "BATCH_SIZE=1", "NUM_PREQ=4")
    assert done.returncode == 2
    assert done.stdout == "false\n"
    assert "NUM_PREQ" in done.stderr
    assert "Traceback" not in done.stderr

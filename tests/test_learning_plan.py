"""`memfit learn` and the plans after it, on the console and in a launch."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.cli import main as console
from hydra_plugins.memfit.cli.launch import read_launch
from hydra_plugins.memfit.compose.learned import VARIABLE, with_lessons
from hydra_plugins.memfit.learning import store
from hydra_plugins.memfit.learning.kind import RESERVED, expectation
from hydra_plugins.memfit.learning.observe import ran
from hydra_plugins.memfit.learning.readings import Readings
from hydra_plugins.memfit.learning.residuals import margin_of
from hydra_plugins.memfit.memory.allocator import DEFAULT_MARGIN, EXPANDABLE
from hydra_plugins.memfit.planning.search import check
from support.hydra_app import BATCH, run, write_app
from support.plans import make_problem

LOG_PROB = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"
LAUNCH = (
    "--framework", "verl", "--framework-version", "0.9.1", "--model", "qwen2.5-7b", "algorithm.adv_estimator=grpo", LOG_PROB,
    "--hardware", "a100-80",
)  # fmt: skip
ONE_NODE = (*LAUNCH, "--gpus", "8")
AREAL = (
    "--framework", "areal", "--hardware", "a100-80", "--model", "qwen2.5-7b", "actor.mb_spec.max_tokens_per_mb=8192",
)  # fmt: skip
SMALL, LARGE = f"{BATCH}=4", f"{BATCH}=32"
DEAD = (
    '  File "/x/verl/workers/actor/dp_actor.py", line 400, in update_policy\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which "
    "4.00 GiB is free. Process 1 has 75.00 GiB memory in use. Of the allocated memory 60.00 GiB is allocated by PyTorch, and "
    "3.00 GiB is reserved by PyTorch but unallocated.\n"
)


class Desk:
    """A user's desk: a store, logs, and the console."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.store = folder / "store.sqlite3"

    def says(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr of a command."""
        status = console.main([str(argument) for argument in arguments])
        return status, *self.capsys.readouterr()

    def json(self, *arguments: str | Path) -> Any:
        """Return the document of a command."""
        return json.loads(self.says(*arguments, "--json")[1])

    def log(self, name: str, text: str) -> Path:
        """Write a log."""
        (self.folder / name).write_text(text)
        return self.folder / name

    def ran(self, name: str, ratio: float) -> Any:
        """Keep a run of `ONE_NODE` whose trainer reserved ``ratio`` of its prediction; return its kind."""
        expected = expected_of_one_node()
        reading = Readings(
            scope=RESERVED, peak_bytes=int(expected["predicted"][RESERVED] * ratio), count=2, source=name
        )
        store.add(self.store, ran(name, expected, reading))
        return self.json("learn", "--list")[0]


@cache
def expected_of_one_node() -> dict[str, Any]:
    """What memfit expects of `ONE_NODE`, without a store."""
    args = console.parse(["check", *ONE_NODE, SMALL, "memfit.learned=false"])
    return expectation(check(read_launch(args).problem))


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Return a desk without a driver and a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEMFIT_STORE", str(tmp_path / "store.sqlite3"))
    return Desk(tmp_path, capsys)


def test_runs_replace_the_default_margin(desk: Desk) -> None:
    """Runs that needed more raise it at once, three lower it; the plan says so, and your own margin wins."""
    kind = desk.ran("a.log", 1.1)
    assert kind["margin"] == pytest.approx(margin_of([1.1], DEFAULT_MARGIN[EXPANDABLE]), abs=0.0011)
    raised = desk.json("check", *ONE_NODE, SMALL)
    assert raised["budget_bytes"] < desk.json("check", *ONE_NODE, SMALL, "memfit.learned=false")["budget_bytes"]
    assert any("learned from 1 run of this kind" in said for said in raised["warnings"])
    for command in (("memfit.margin=0.08",), ("memfit.learned=false",)):
        assert not any("learned" in said for said in desk.json("check", *ONE_NODE, SMALL, *command)["warnings"])
    assert desk.says("learn", "--forget", kind["kind"])[:2] == (0, "forgotten: 1 run\n")
    for name in ("a.log", "b.log", "c.log"):
        kind = desk.ran(name, 1.0)
    assert kind["margin"] == pytest.approx(margin_of([1.0] * 3, DEFAULT_MARGIN[EXPANDABLE]), abs=0.0011)
    assert [seen["outcome"] for seen in kind["runs"]] == ["ran"] * 3


def test_another_kind_of_run_learns_nothing_from_it(desk: Desk) -> None:
    """Another accelerator, another strategy or another size of the model is another kind."""
    desk.ran("a.log", 1.1)
    others = (
        (*LAUNCH[:-1], "h200", "--gpus", "8"),
        (*ONE_NODE, "actor_rollout_ref.actor.strategy=fsdp2"),
        (*LAUNCH[:5], "qwen2.5-3b", *LAUNCH[6:], "--gpus", "8"),
        (*LAUNCH, "--gpus", "1"),
    )
    for other in others:
        assert not any("learned" in said for said in desk.json("check", *other, SMALL)["warnings"])


def test_a_plan_that_died_is_not_made_again(desk: Desk) -> None:
    """A launch that memfit called fitting and that ran out of memory is planned smaller, whatever the margin."""
    asked = (*ONE_NODE, f"{BATCH}=16")
    before = desk.json("check", *asked)
    died = next(p["peak_bytes"] for p in before["phases"] if p["name"] == "update_actor")
    assert before["fits"]
    (kind,) = desk.json("learn", desk.log("dead.log", DEAD), *asked)
    assert kind["limits"] == {"update_actor": pytest.approx(died * 79.15 / 87.15 * 0.99, rel=0.001)}
    for margin in ((), ("memfit.margin=0.0",)):
        status, _, _ = desk.says("check", *asked, *margin)
        plan = desk.json("plan", *asked, *margin)
        now = next(p["peak_bytes"] for p in plan["phases"] if p["name"] == "update_actor")
        assert (status, plan["fits"]) == (3, True)
        assert now <= kind["limits"]["update_actor"]
    for index in range(5):
        desk.ran(f"{index}.log", 0.9)
    assert desk.says("check", *asked)[0] == 3


def test_a_process_hands_on_what_it_planned_last(tmp_path: Path) -> None:
    """After a hundred launches the variable is no longer than after sixteen: the C library keeps each text that it had."""
    environ = {"XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path)}
    problem = make_problem()
    sizes = []
    for number in range(100):
        hardware = replace(problem.hardware, capacity_bytes=problem.hardware.capacity_bytes + number)
        one = replace(problem, hardware=hardware)
        assert with_lessons(one, is_own_margin=False, environ=environ, again=lambda margin: problem) == one
        sizes.append(len(environ[VARIABLE]))
    assert str(problem.hardware.capacity_bytes + 99) in environ[VARIABLE]
    assert sizes[-1] == sizes[15] > sizes[0]


@pytest.mark.parametrize("how", ["no database", pytest.param("locked", marks=pytest.mark.slow), "unreadable variable"])
def test_a_store_that_cannot_be_used_costs_a_warning(desk: Desk, how: str) -> None:
    """The default margin counts, once said; a launch never fails because of the store."""
    expected = desk.json("check", *ONE_NODE, SMALL)
    if how == "no database":
        desk.store.write_bytes(b"junk" * 1000)
    elif how == "locked":
        desk.ran("a.log", 1.1)
        desk.store.chmod(0o644)
        lock = store.sqlite3.connect(desk.store, isolation_level=None)
        lock.execute("begin exclusive")
    else:
        os.environ[VARIABLE] = "{"
        assert "unset MEMFIT_LEARNED" in desk.says("check", *ONE_NODE, SMALL)[2]
        return
    got = desk.json("check", *ONE_NODE, SMALL)
    (warning,) = [said for said in got["warnings"] if said not in expected["warnings"]]
    assert "store of learned runs" in warning and "The default margin counts." in warning
    assert (got["phases"], got["fits"]) == (expected["phases"], expected["fits"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a run"),
        (("none.log",), "does not exist"),
        (("few.log", *ONE_NODE, SMALL), "holds 1 reading"),
        (("empty.log", *ONE_NODE, SMALL), "no memory readings in"),
        (("far.log", *ONE_NODE, SMALL), "this is not the run of this plan"),
        (
            ("dead.log", *LAUNCH[:-1], "h200", "--gpus", "8", SMALL),
            "died on a device of 79.15 GiB, and the plan is for one of",
        ),
        (
            ("far.log", *AREAL, "--gpus", "8", "allocation_mode=sglang:d4+fsdp:d4"),
            "which release of areal ran is not known",
        ),
        (("two",), "learn from one run at a time"),
        (("old",), "it is of an older memfit"),
        (("unplanned",), "was not planned"),
        (("--forget", "xyz"), "unknown kind of run 'xyz'"),
        (
            ("twice.log", "--framework-version", "0.5.0", *LAUNCH[:2], *LAUNCH[4:], "--gpus", "8", SMALL),
            "trainer and engine share",
        ),
    ],
)
def test_wrong_input_is_one_clear_error(words: tuple[str, ...], message: str, desk: Desk) -> None:
    """Exit status 2, what is wrong, and nothing is learned."""
    line = "step:1 - perf/max_memory_reserved_gb:{} - x:1\n"
    desk.log("few.log", line.format(20))
    desk.log("twice.log", line.format(20) * 2)
    desk.log("far.log", line.format(900) * 2)
    desk.log("empty.log", "nothing\n")
    desk.log("dead.log", DEAD)
    for name, text in (
        ("two/a", "{}"),
        ("two/b", "{}"),
        ("old", "{}"),
        ("unplanned", '{"planned": false, "reason": "x"}'),
    ):
        (desk.folder / name).mkdir(parents=True)
        (desk.folder / name / "memfit.json").write_text(text)
    os.chdir(desk.folder)
    status, out, err = desk.says("learn", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert store.read(desk.store) == []


@pytest.mark.slow
def test_a_launch_leaves_what_learning_needs_and_learns_from_it(tmp_path: Path, desk: Desk) -> None:
    """The record of a Hydra job and its log are enough; the next job of the same kind plans with it, and records that."""
    app = write_app(tmp_path / "app")
    words = ("actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct", "algorithm.adv_estimator=grpo", SMALL, LOG_PROB)
    launch = (app, *words, "trainer.n_gpus_per_node=8", "+hardware=a100-80", "memfit.framework_version=0.9.1")
    environ = {"MEMFIT_STORE": str(desk.store), "HF_HUB_OFFLINE": "1"}
    folder = tmp_path / "first"
    assert run([*launch, f"hydra.run.dir={folder}"], environ=environ).code == 0
    expected = json.loads((folder / ".hydra" / "memfit.json").read_text())["learning"]
    reserved = expected["predicted"]["reserved"] * 1.05 / 2**30
    (folder / "console.log").write_text(f"step:1 - perf/max_memory_reserved_gb:{reserved:.5f} - x:1\n" * 2)
    (kind,) = desk.json("learn", folder)
    assert kind["alike"] == expected["kind"]
    done = run([*launch, f"hydra.run.dir={tmp_path / 'second'}"], environ=environ)
    record = json.loads((tmp_path / "second" / ".hydra" / "memfit.json").read_text())
    assert done.code == 0
    assert record["learning"]["margin"] == kind["margin"] > expected["margin"]
    assert "learned from 1 run" in " ".join(done.err.replace("│", " ").split())


def test_all_processes_of_a_launch_learn_the_same(desk: Desk) -> None:
    """What the first process read is handed to its children, also when another run is learned meanwhile."""

    def margin() -> float:
        args = console.parse(["check", *ONE_NODE, SMALL])
        return read_launch(args).problem.margin.share

    first = margin()
    handed = os.environ[VARIABLE]
    desk.ran("a.log", 1.2)
    os.environ[VARIABLE] = handed
    assert margin() == first
    del os.environ[VARIABLE]
    assert margin() > first


USAGE = "Memory-Usage x: memory allocated (GB): 1, memory reserved (GB): {0}, device memory used/total (GB): 9/79\n"


def several_nodes_of_areal(desk: Desk, version: str) -> tuple[Any, Any]:
    """Return what a launch on two nodes is told before and after a run of its kind that needed 10 % more."""
    layout = "allocation_mode=sglang:d8+fsdp:d8"
    two = (*AREAL, "--gpus", "8", "--nodes", "2", layout, "--framework-version", version)
    before = desk.json("check", *two)
    reserved = max(p["processes"]["trainer"] for p in before["phases"]) * 1.1 / 2**30
    desk.json("learn", desk.log("a.log", USAGE.format(reserved) * 2), *two)
    return before, desk.json("check", *two)


@pytest.mark.parametrize(("version", "main"), [("0.4.1", "train"), ("1.0.2", "areal.infra.launcher.slurm")])
def test_several_nodes_that_plan_for_themselves_are_told_and_not_changed(
    version: str, main: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a launcher has each node compose, and each may have a store of its own, the margin is only said."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(main, None))
    before, after = several_nodes_of_areal(desk, version)
    assert after["phases"] == before["phases"]
    assert any("not used where several nodes plan" in said for said in after["warnings"])


def test_one_controller_of_several_nodes_uses_what_it_learned(desk: Desk) -> None:
    """AReaL's controller composes alone, on however many nodes: there are no two plans to differ."""
    before, after = several_nodes_of_areal(desk, "1.0.2")
    assert after["budget_bytes"] < before["budget_bytes"]
    assert any("learned from 1 run of this kind" in said for said in after["warnings"])

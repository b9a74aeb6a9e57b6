"""Nothing that a user points memfit at is ever executed: configs, checkpoints, logs, caches, values for a shell."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.cli.config_file import read_config_file
from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.model.resolve import resolve_model
from support.hydra_app import ROOT

PACKAGE = ROOT / "hydra_plugins" / "memfit"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = frozenset(
    (
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "code",
        "codeop",
        "runpy",
        "pty",
        "imp",
        "commands",
    )
)
FORBIDDEN_NAMES = frozenset(("eval", "exec", "compile", "__import__", "execfile", "breakpoint", "input"))
FORBIDDEN_CALLS = frozenset(
    (
        "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "subprocess.getoutput",
        "subprocess.getstatusoutput", "subprocess.check_output", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
        "yaml.unsafe_load_all", "torch.load", "numpy.load", "np.load", "importlib.util.spec_from_file_location",
        "hydra.utils.instantiate", "hydra.utils.get_class", "hydra.utils.get_method", "hydra.utils.call",
    )
)  # fmt: skip
SWITCHES = ("shell", "trust_remote_code", "allow_pickle")
STARTERS = {"exact/compiler.py", "hardware/nvml.py", "hardware/ray_cluster.py", "hardware/slurm.py"}
"""The only files that start a process: this Python, with a module or a script of memfit's own."""


@cache
def tree(file: Path) -> ast.Module:
    """Return the syntax of a file of the package."""
    return ast.parse(file.read_text(encoding="utf-8"))


def findings(module: ast.Module) -> Iterator[str]:
    """Yield what in a module could execute what it is given."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            yield from _call(node)
        if isinstance(node, ast.keyword) and node.arg in SWITCHES and ast.unparse(node.value) != "False":
            yield f"{node.arg}={ast.unparse(node.value)}"


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if name in FORBIDDEN_NAMES or name in FORBIDDEN_CALLS:
        yield f"{name}()"
    if name == "yaml.load" and "SafeLoader" not in ast.unparse(node):
        yield "yaml.load() without a SafeLoader"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_holds_what_executes_its_input(file: Path) -> None:
    """No pickle, eval, exec, shell, unsafe yaml, and no instantiation of what a config names."""
    assert list(findings(tree(file))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "eval('1')", "exec(x)", "os.system(x)", "yaml.load(x)",
        "yaml.load(x, Loader=L)",
        "subprocess.run(x, shell=True)", "f(trust_remote_code=remote)", "hydra.utils.instantiate(c)", "torch.load(p)",
    ],
)  # fmt: skip
def test_the_search_can_fail(text: str) -> None:
    """Each kind of what is forbidden is found."""
    assert len(list(findings(ast.parse(text)))) == 1


def test_processes_are_started_in_few_places() -> None:
    """The readers of driver, Ray and Slurm, and the TPU compiler: this Python with memfit's own module, or `sinfo`; no shell."""
    found = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if any(isinstance(n, ast.Call) and ast.unparse(n.func).startswith("subprocess.") for n in ast.walk(tree(file)))
    }
    assert found == STARTERS
    for name in STARTERS:
        started = [n for n in ast.walk(tree(PACKAGE / name)) if isinstance(n, ast.Call)]
        (start,) = [n for n in started if ast.unparse(n.func) in ("subprocess.Popen", "subprocess.run")]
        assert ("'sinfo'" if name == "hardware/slurm.py" else "sys.executable") in ast.unparse(tree(PACKAGE / name))
        assert isinstance(start.args[0], (ast.List, ast.Name))
        assert "shell" not in {keyword.arg for keyword in start.keywords}


def test_modules_are_imported_by_constant_names() -> None:
    """``import_module`` never gets a text of the user's: a constant, a command or an adapter of memfit's own tables."""
    allowed = {"f'hydra_plugins.memfit.cli.{name}'", "module"}
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                name = ast.unparse(node.args[0])
                assert isinstance(node.args[0], ast.Constant) or name.isupper() or name in allowed, (file, name)


def marker(folder: Path) -> Path:
    """Return the file that an attack would make."""
    return folder / "executed"


TAGS = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.check_output [[touch, '{marker}']]",
)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_yaml_are_refused(tag: str, tmp_path: Path) -> None:
    """A yaml tag that would build a Python object is one error, and nothing runs."""
    text = f"data:\n  train_batch_size: {tag.format(marker=marker(tmp_path))}\n"
    file = tmp_path / "run.yaml"
    file.write_text(text)

    with pytest.raises(MemfitError, match="not valid yaml"):
        read_config_file(str(file))

    assert not marker(tmp_path).exists()
    yaml.unsafe_load(text)  # the attack is a real one
    assert marker(tmp_path).exists() or "name" in tag or "module" in tag


def test_billions_of_laughs_are_bounded(tmp_path: Path) -> None:
    """A yaml file of aliases that unfold without end ends, by time and by memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file = tmp_path / "laughs.yaml"
    file.write_text("\n".join(lines))
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));\n"
        "import sys; from hydra_plugins.memfit.cli.main import main\n"
        f"sys.exit(main(['check', '--framework', 'verl', '--hardware', 'h200', '--config', {str(file)!r}]))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2, done.stderr[-500:]
    assert "aliases unfold" in done.stderr


def test_an_alias_in_itself_is_refused(tmp_path: Path) -> None:
    """A circle of aliases is the same clear error; a few aliases are fine."""
    file = tmp_path / "run.yaml"
    file.write_text("data: &d {x: *d}")
    with pytest.raises(MemfitError, match="yaml"):
        read_config_file(str(file))

    file.write_text("data: &d {x: 1}\nmore: *d")
    assert read_config_file(str(file)).values == {"data": {"x": 1}, "more": {"x": 1}}


def test_a_checkpoint_is_read_and_never_run(tmp_path: Path) -> None:
    """auto_map, a modeling file, a pickle and a hook of Python beside config.json: only the numbers are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    attack = f"import pathlib; pathlib.Path({str(marker(tmp_path))!r}).touch()\n"
    for name in ("modeling_own.py", "configuration_own.py", "sitecustomize.py", "__init__.py", "setup.py"):
        (folder / name).write_text(attack)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(marker(tmp_path)).encode())
    config = {
        "architectures": ["OwnForCausalLM"], "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
        "_target_": "os.system", "trust_remote_code": True, "model_type": "qwen2", "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    resolve_model(str(folder), environ={"HOME": str(tmp_path)})

    assert not marker(tmp_path).exists()


NAMES = (
    "a b", "it's", 'say "so"', "$(touch executed)", "`touch executed`", "a;b", "-x", "[x]", "ünï", "a\nb",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_paths(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config file in a folder of any name is read, and a missing one is one error that names it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "run.yaml").write_text("actor_rollout_ref:\n  model: {path: Qwen/Qwen2.5-0.5B-Instruct}\n")
    words = [
        "--framework",
        "verl",
        "--hardware",
        "h200",
        "--gpus",
        "1",
        "memfit.report=off",
        "algorithm.adv_estimator=grpo",
    ]
    micro = [
        f"actor_rollout_ref.{key}=1"
        for key in ("actor.ppo_micro_batch_size_per_gpu", "rollout.log_prob_micro_batch_size_per_gpu")
    ]

    assert main(["check", *words, *micro, "--config", str(folder / "run.yaml")]) in (0, 3)
    assert main(["check", *words, *micro, "--config", str(folder / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_links_of_a_checkpoint(tmp_path: Path) -> None:
    """A config.json that is a link to an endless device, to itself or to nothing is one error."""
    for number, target in enumerate(("/dev/zero", "config.json", "/nowhere")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").symlink_to(target)
        with pytest.raises(MemfitError):
            resolve_model(str(folder), environ={"HOME": str(tmp_path)})


def test_the_environment_is_read_only_where_a_config_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``${oc.env:...}`` in a key that no plan reads is not resolved, and no secret is printed or recorded."""
    os.environ["SOME_TOKEN"] = "s3cret-value"
    words = ["--framework", "verl", "--hardware", "h200", "--json", "+mine.token='${oc.env:SOME_TOKEN}'"]

    main(["plan", *words, "algorithm.adv_estimator=grpo", "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct"])

    captured = capsys.readouterr()
    assert captured.out.startswith("{")
    assert "s3cret" not in captured.out + captured.err


HOSTILE = (
    "a b", "it's", "$(touch executed)", "`touch executed`", "; touch executed", "&& touch executed", "| touch executed",
    "> executed", "'; touch executed; '", '"; touch executed; "', "\\'; touch executed #", "${IFS}touch${IFS}executed",
    "a\\", "!x", "*", "é漢", "-n", "~",
)  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_env_lines_are_safe_to_evaluate(shell: str, tmp_path: Path) -> None:
    """``eval "$(memfit env ...)"`` in a real shell: each variable has the text that was typed, and nothing was run."""
    from hydra_plugins.memfit.cli.env import exports

    variables = {f"VALUE_{number}": text for number, text in enumerate((*HOSTILE, "two\nlines; touch executed"))}
    script = (
        "\n".join(exports(variables)) + f"\n{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    )

    done = subprocess.run([shell, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    seen = json.loads(done.stdout)
    assert {name: seen[name] for name in variables} == variables
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["A B=1", "X;touch executed=1", "$(touch executed)=1", "BATCH-SIZE=1", "é=1"])
def test_env_prints_no_name_that_is_no_variable(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A word whose name is no variable's never reaches the shell: the one line is ``false``."""
    status = main(["env", "--hardware", "v4-16", "memfit.report=off", "BATCH_SIZE=1", "NUM_PRE_Q=8", word])

    assert status != 0
    assert capsys.readouterr().out.split() == ["false"]

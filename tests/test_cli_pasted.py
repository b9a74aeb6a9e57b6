"""Launch lines as people paste them: what is read of them, what is left out, what is refused."""

from __future__ import annotations

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.cli.main import parse
from hydra_plugins.memfit.cli.pasted import read_pasted

MODULE = "-m verl.trainer.main_ppo"


@pytest.mark.parametrize(
    ("line", "words", "environ", "left_out"),
    [
        ("a.b=1 +hardware=h200", "a.b=1 +hardware=h200", {}, ()),
        (f"python {MODULE} a=1", "a=1", {}, ()),
        (f"python3.11 -u {MODULE} a=1", "a=1", {}, ()),
        (f"/opt/venv/bin/python3 {MODULE} a=1", "a=1", {}, ()),
        (f"PYTHONUNBUFFERED=1 CUDA_VISIBLE_DEVICES=0,1 python3 {MODULE} a=1", "a=1",
         {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, ()),
        (f"env HYDRA_FULL_ERROR=1 nohup python3 {MODULE} a=1", "a=1", {"HYDRA_FULL_ERROR": "1"}, ()),
        (f"a=1 python3 {MODULE} b=2", "a=1 b=2", {}, ()),
        ("python3 examples/train.py a=1", "a=1", {}, ()),
        ("train.py a=1", "a=1", {}, ()),
        ("python3 -m areal.launcher.local examples/gsm8k.py a=1", "a=1", {}, ()),
        (f"torchrun --standalone --nproc_per_node 8 {MODULE} a=1", "a=1", {},
         (f"torchrun --standalone --nproc_per_node 8 {MODULE} (devices and nodes: --gpus N --nodes N)",)),
        ("python -m torch.distributed.run --nproc-per-node=8 train.py a=1", "a=1", {},
         ("python -m torch.distributed.run --nproc-per-node=8 train.py (devices and nodes: --gpus N --nodes N)",)),
        (f"ray job submit --address=http://head:8265 --runtime-env=env.yaml python3 {MODULE} a=1", "a=1", {},
         ("ray job submit --address=http://head:8265 --runtime-env=env.yaml",)),
        (f"srun -N 2 python3 {MODULE} a=1", "a=1", {}, ("srun -N 2",)),
        (f"python3 {MODULE} a=1 --cfg job --resolve", "a=1", {}, ("--cfg job", "--resolve")),
        (f"python3 {MODULE} a=1 -c job -m", "a=1", {}, ("-c job", "-m")),
        (f"python3 {MODULE} --config-name ppo_trainer a=1", "a=1", {}, ()),
        (f"python3 {MODULE} --config-path=config --config-name=ppo_trainer.yaml a=1", "a=1", {}, ()),
        (f"python3 {MODULE} --config-path ./config a=1", "a=1", {}, ()),
        (f"python3 {MODULE} a=1 --unknown", "a=1 --unknown", {}, ()),
    ],
)  # fmt: skip
def test_only_the_values_are_left(line: str, words: str, environ: dict[str, str], left_out: tuple[str, ...]) -> None:
    """Environment, launcher and Hydra's own flags are told from the values, in any of the usual forms."""
    pasted = read_pasted(line.split())
    assert (" ".join(pasted.words), dict(pasted.environ), pasted.left_out) == (words, environ, left_out)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"python3 {MODULE} a=1 \\\n    b='x y' 2>&1 | tee log", ("a=1", "b=x y")),
        (f"X=1 python3 {MODULE} a=$GIVEN > log", ("a=5",)),
        (f'python3 {MODULE} a=1 "$@"', ("a=1",)),
        ("python3 train.py 'a=[1,2]'", ("a=[1,2]",)),
        ("data.path=my file.py x", ("data.path=my file.py x",)),
        ("\\", ()),
        (" ", ()),
    ],
)
def test_a_line_in_quotes(line: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole line in one word is taken apart as a shell would, up to its redirections; a value with spaces is not."""
    monkeypatch.setenv("GIVEN", "5")
    assert read_pasted([line]).words == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run_grpo.sh", "run_grpo.sh is a shell script: paste the launch line that is in it"),
        ("bash run_grpo.sh a=1", "run_grpo.sh is a shell script: paste the launch line that is in it"),
        ("torchrun --nproc_per_node 8 a=1", "no python module or script stands behind 'torchrun'"),
        (f"python3 {MODULE} --config-name mine a=1", "then --config FILE"),
        (f"python3 {MODULE} --config-path=conf a=1", "then --config FILE"),
        (f"python3 {MODULE} -cd conf a=1", "then --config FILE"),
    ],
)
def test_what_memfit_cannot_read_is_refused_with_the_way_out(line: str, message: str) -> None:
    """A script and a config that only Hydra can compose are one clear error."""
    with pytest.raises(ConfigError, match=message):
        read_pasted(line.split())


def test_a_shell_variable_without_a_value_is_refused() -> None:
    """Nothing is planned for a value that nobody knows."""
    with pytest.raises(ConfigError, match="shell variable NOWHERE_SET"):
        read_pasted([f"python3 {MODULE} a=$NOWHERE_SET"])


def test_the_name_of_a_shipped_config_is_kept() -> None:
    """`ppo_megatron_trainer` says which backend the launch has."""
    assert read_pasted(f"python3 {MODULE} --config-name=ppo_megatron_trainer.yaml".split()).config_name == (
        "ppo_megatron_trainer"
    )


def test_flags_of_a_launcher_are_not_memfits() -> None:
    """`srun --gpus=8` counts the GPUs of a job, and `--json` of another program asks memfit for nothing."""
    args = parse(
        [
            "plan",
            "--hardware",
            "h200",
            "srun",
            "--nodes=2",
            "--gpus=8",
            "--json",
            "python3",
            "-m",
            "verl.x",
            "a=1",
            "--nodes",
            "4",
        ]
    )

    assert (args.nodes, args.gpus, args.json, args.overrides) == (4, None, False, ["a=1"])
    assert args.pasted.left_out == ("srun --nodes=2 --gpus=8 --json",)

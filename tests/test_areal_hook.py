"""The hook inside AReaL's own ``load_expr_config``, which composes with Hydra's ``compose`` and checks every key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hydra_app import ROOT, Ran

pytestmark = pytest.mark.areal

CONFIG = """
experiment_name: gsm8k-grpo
trial_name: trial0
tokenizer_path: ${actor.path}
cluster:
  n_nodes: 1
  n_gpus_per_node: 1
  fileroot: FILEROOT
  name_resolve: {type: nfs, nfs_record_root: FILEROOT/names}
gconfig: {n_samples: 4, max_new_tokens: 512}
rollout:
  backend: sglang:d1
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  max_concurrent_rollouts: 32
actor:
  backend: fsdp:d1
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  path: Qwen/Qwen2.5-0.5B-Instruct
  gradient_checkpointing: false
  mb_spec: {max_tokens_per_mb: 5120}
sglang: {model_path: "${actor.path}", mem_fraction_static: 0.8}
train_dataset: {path: openai/gsm8k, type: rl, batch_size: 8}
saver: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
evaluator: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
recover: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
stats_logger: {experiment_name: "${experiment_name}", trial_name: "${trial_name}", fileroot: "${cluster.fileroot}"}
"""
PROGRAM = """
import json, sys
from dataclasses import asdict
from areal.api.cli_args import GRPOConfig, load_expr_config
config, _ = load_expr_config(sys.argv[1:], GRPOConfig)
print("CONFIG " + json.dumps(asdict(config), default=str, sort_keys=True))
"""


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    """Return the yaml of a GRPO launch on one GPU."""
    config = tmp_path / "grpo.yaml"
    config.write_text(CONFIG.replace("FILEROOT", str(tmp_path / "root")), encoding="utf-8")
    return config


def load(config: Path, *words: str) -> Ran:
    """Load the config as AReaL's training script does, in a process of its own."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MEMFIT_")}
    variables["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", PROGRAM, "--config", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, cwd=config.parent)
    return Ran(code=done.returncode, out=done.stdout, err=done.stderr)


def loaded(ran: Ran) -> dict[str, object]:
    """Return the config that the training script got."""
    assert ran.code == 0, ran.err
    (line,) = (line for line in ran.out.splitlines() if line.startswith("CONFIG "))
    config: dict[str, object] = json.loads(line.removeprefix("CONFIG "))
    return config


def test_areal_accepts_what_the_hook_leaves(launch: Path) -> None:
    """Its dataclasses refuse unknown keys: nothing of memfit is left, and a launch that is not judged is unchanged."""
    as_composed = loaded(load(launch))
    unjudged = load(launch, "+hardware=a40", "memfit.framework=none", "memfit.strict=false")

    assert loaded(unjudged) == as_composed
    assert "unknown framework 'none'" in unjudged.err


def test_a_refusal_stops_areal_before_it_starts(launch: Path) -> None:
    """A strict launch that cannot be judged ends with the reason, and no config reaches the script."""
    ran = load(launch, "+hardware=a40", "memfit.framework=none")

    assert ran.code != 0
    assert "CONFIG" not in ran.out
    assert "unknown framework 'none'" in ran.err

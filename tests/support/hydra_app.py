"""Small Hydra applications for the tests: one whose config is verl's own, one that knows nothing of memfit.

Nothing of the framework is needed: the config is verl's, from the defaults that memfit embeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hydra_plugins.memfit.frameworks.verl import defaults

ROOT = Path(__file__).resolve().parents[2]
HYDRA = {
    "1.3.2": ["hydra-core==1.3.2"],
    "1.3.8": ["hydra-core==1.3.8"],
    "1.4.0.dev1": ["hydra-core==1.4.0.dev1", "omegaconf==2.4.0.dev2"],
    "1.4.0rc3": ["hydra-core==1.4.0rc3"],
}
"""The versions of Hydra that memfit is tested beside, oldest first, and what pip installs for each."""
MODEL = "actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct"
LAUNCH = (
    MODEL,
    "algorithm.adv_estimator=grpo",
    "trainer.n_gpus_per_node=1",
    "data.train_batch_size=64",
    "data.max_prompt_length=2048",
    "data.max_response_length=4096",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
)
"""A launch that asks one GPU for far too much: 32 sequences of 6144 tokens in one piece, a vocabulary of 151936."""
BATCH = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"

APP = """\
import json, os
import hydra
from omegaconf import OmegaConf

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    shown = OmegaConf.to_container(cfg, resolve=True)
    print("JOB " + json.dumps({"config": shown, "MEMFIT_PLAN": os.environ.get("MEMFIT_PLAN"), "FOO": os.environ.get("FOO")}))

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What one run of an application left."""

    code: int
    out: str
    err: str

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that ran, in order: their resolved configs and two environment variables."""
        return [json.loads(line.removeprefix("JOB ")) for line in self.out.splitlines() if line.startswith("JOB ")]


def write_app(folder: Path, config: Mapping[str, Any] | None = None, **files: str) -> Path:
    """Write an application to ``folder`` and return its script; ``files``: further yaml texts by path below conf/."""
    conf = folder / "conf"
    conf.mkdir(parents=True, exist_ok=True)
    tree = defaults.load(defaults.VERSIONS[-1]) if config is None else dict(config)
    (conf / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(tree)), encoding="utf-8")
    for name, text in files.items():
        target = conf / f"{name}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    script = folder / "app.py"
    script.write_text(APP, encoding="utf-8")
    return script


def run(
    command: Sequence[str | Path],
    *,
    python: Path | str = sys.executable,
    environ: Mapping[str, str] | None = None,
    path: Path | None = ROOT,
) -> Ran:
    """Run ``python command`` in the folder of its script; ``path`` is where memfit lies, ``None``: as it is installed."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MEMFIT_", "HYDRA_"))}
    variables.pop("PYTHONPATH", None)
    variables["MEMFIT_STORE"] = os.path.join(os.sep, "nonexistent", "memfit.sqlite3")
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(python), "-W", "ignore", *map(str, command)],
        cwd=Path(command[0]).parent,
        env={**variables, "COLUMNS": "100", **(environ or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ran(code=done.returncode, out=done.stdout, err=done.stderr)

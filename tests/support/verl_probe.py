"""verl's ``main_ppo`` with a task runner that looks at its config instead of training; run as a program.

Everything up to the task runner is verl's own: its config directory, `auto_set_device`, `validate_config`, `run_ppo`
and Ray. The runner is an actor in a Ray worker that cannot import memfit; it does to the config what verl's runner does
(print, resolve, build the dataclasses) and writes what it saw to the file named by ``VERL_PROBE_OUT``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hydra
import ray
import verl
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device


@ray.remote
class Probe:
    """Stands where verl's TaskRunner stands."""

    def run(self, config: Any) -> None:
        """Resolve the config as verl's runner does and build the dataclasses that verl's workers build."""
        import importlib.abc
        import json
        import sys

        from omegaconf import OmegaConf, open_dict

        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name: str, *rest: Any) -> None:
                if name.startswith("hydra_plugins"):
                    raise ModuleNotFoundError(f"{name} is not installed in this worker")

        loaded = [name for name in sys.modules if name.startswith("hydra_plugins")]
        sys.meta_path.insert(0, Absent())
        unresolved = OmegaConf.to_container(config)
        OmegaConf.resolve(config)

        from verl.utils.config import omega_conf_to_dataclass

        seen = {"loaded": loaded, "unresolved": unresolved, "resolved": OmegaConf.to_container(config, resolve=True)}
        parts = config.actor_rollout_ref
        # verl's worker renames the reference's keys to those of an actor before it builds the dataclass
        with open_dict(parts.ref):
            for key in ("micro_batch_size", "micro_batch_size_per_gpu", "max_token_len_per_gpu"):
                parts.ref[f"ppo_{key}"] = parts.ref.pop(f"log_prob_{key}")
            parts.ref.use_dynamic_bsz = parts.ref.pop("log_prob_use_dynamic_bsz")
            parts.ref.ppo_mini_batch_size = parts.actor.ppo_mini_batch_size
        sections = {name: parts[name] for name in ("actor", "rollout", "model")}
        if need_reference_policy(config):
            sections["ref"] = parts.ref
        if need_critic(config):
            sections["critic"] = config.critic
        seen["built"] = {name: type(omega_conf_to_dataclass(part)).__name__ for name, part in sections.items()}
        Path(os.environ["VERL_PROBE_OUT"]).write_text(json.dumps(seen), encoding="utf-8")


@hydra.main(
    config_path=str(Path(verl.__file__).parent / "trainer" / "config"), config_name="ppo_trainer", version_base=None
)
def main(config: Any) -> None:
    """Do what verl's ``main_ppo`` does, with the probe as the task runner."""
    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=Probe)


if __name__ == "__main__":
    main()

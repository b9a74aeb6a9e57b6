"""Names that verl takes as text: a slip in one is refused, or said, with the nearest name that the release has."""

from __future__ import annotations

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, ROLLOUT
from support.verl_problem import read_problem

FUSED = {f"{MODEL}.use_fused_kernels": True}
BACKEND = f"{MODEL}.fused_kernel_options.impl_backend"


@pytest.mark.parametrize(
    ("values", "version", "said"),
    [
        ({f"{ROLLOUT}.name": "vlm"}, "0.9.1", "it has sglang, trtllm, vllm. Did you mean 'vllm'"),
        (
            {f"{ACTOR}.strategy": "fsdp3"},
            "0.9.1",
            "has no such strategy; it has .*torchtitan, veomni. Did you mean 'fsdp",
        ),
        ({f"{ACTOR}.strategy": "veomni"}, "0.6.1", "verl 0.6.1 has no such strategy; it has fsdp, fsdp2, megatron"),
        ({f"{ROLLOUT}.mode": "asink"}, "0.5.0", "it has async, sync. Did you mean 'async'"),
        ({f"{ROLLOUT}.mode": "sync"}, "0.7.1", "rollout.mode=sync: verl 0.7.1 has no such mode; it has async"),
        ({**FUSED, BACKEND: "trition"}, "0.9.1", "it has liger, torch, triton. Did you mean 'triton'"),
        ({**FUSED, BACKEND: "liger"}, "0.8.0", "has no such impl_backend; it has torch, triton"),
        ({f"{ACTOR}.fsdp_config.model_dtype": "bf61"}, "0.9.1", "is not one of fp32, .*Did you mean 'bf16'"),
    ],
)
def test_a_name_that_the_release_lacks_is_refused_with_the_nearest(values: dict[str, object], version: str, said: str):
    """The message names the key, what the release has, and what was probably meant."""
    with pytest.raises(ConfigError, match=said):
        read_problem(values, version=version)


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("gpro", "0.9.1", "Did you mean 'grpo'?"),
        ("gdpo", "0.6.1", "algorithm.adv_estimator=gdpo is none of verl 0.6.1's"),
        ("gdpo", "0.9.1", ""),
        ("grpo", "0.4.1", ""),
    ],
)
def test_an_advantage_estimator_that_verl_lacks_is_a_warning(name: str, version: str, said: str):
    """The user's own code may register one, so the launch goes on; one that the release has is not mentioned."""
    warnings = read_problem({"algorithm.adv_estimator": name}, version=version).warnings
    found = [line for line in warnings if "adv_estimator" in line]
    assert len(found) == bool(said)
    assert said in "".join(found)

"""AReaL's layouts, releases and keys: what is read from which config, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.areal import allocation, schema, versions
from hydra_plugins.memfit.frameworks.areal.adapter import ArealAdapter
from hydra_plugins.memfit.frameworks.areal.knobs import WRITABLE_KEYS
from hydra_plugins.memfit.frameworks.view import View
from support.areal_launch import GIB, grpo, memfit, phase, planned

BACKENDS = {"rollout__backend": "sglang:d4p1t1", "actor__backend": "fsdp:d4p1t1"}
ERAS: dict[str, dict[str, Any]] = {
    "0.3.1": {
        "allocation_mode": "sglang.d4p1t1+d4p1t1",
        "actor__mb_spec__max_tokens_per_mb": None,
        "actor__mb_spec__max_tokens_per_gpu": 10240,
    },
    "0.3.4": {"allocation_mode": "sglang.d4p1t1+d4p1t1", "weight_update_mode": "disk"},
    "0.4.1": {"allocation_mode": "sglang.d4p1t1+d4p1t1"},
    "0.5.3": {"allocation_mode": "sglang:d4p1t1+fsdp:d4p1t1"},
    "1.0.4": BACKENDS,
}


@pytest.mark.parametrize("version", ERAS)
def test_the_release_is_read_from_the_config(version: str) -> None:
    """Without a release named or installed, the keys of the config say which one it is for."""
    status, answer, err = memfit("check", "h800", grpo(**ERAS[version]))

    assert status == 0, err
    assert answer["framework_version"] == version


@pytest.mark.parametrize("version", ERAS)
def test_a_plan_writes_keys_that_the_release_has(version: str) -> None:
    """A launch too large for its GPU gets a plan in the keys of its own era, all of them on the frozen list."""
    changes = {**ERAS[version], "actor__gradient_checkpointing": False, "actor__path": "Qwen/Qwen2.5-7B-Instruct"}
    _, answer, err = memfit("plan", "h800", grpo(**changes))

    assert answer["fits"], err
    assert planned(answer)
    for key in planned(answer):
        assert key in WRITABLE_KEYS
        assert schema.known(version, key)


@pytest.mark.parametrize("goal", ["fit", "fast"])
@pytest.mark.parametrize(("hardware", "gpus"), [("a40", 1), ("rtx4090", 2), ("h800", 8)])
@pytest.mark.parametrize("era", ["0.4.1", "0.5.3", "1.0.4"])
def test_a_plan_is_a_fixed_point(era: str, hardware: str, gpus: int, goal: str) -> None:
    """The planned values, asked for, fit; under goal=fit they are not changed again, under goal=fast never made smaller."""
    half = max(1, gpus // 2)
    layout = {k: v.replace("d4", f"d{half}") if isinstance(v, str) else v for k, v in ERAS[era].items()}
    values = grpo(**layout, cluster__n_gpus_per_node=gpus, actor__gradient_checkpointing=False, memfit__goal=goal)
    _, answer, err = memfit("plan", hardware, values)
    assert answer["fits"], err
    _, again, err = memfit("plan", hardware, {**values, **planned(answer)})

    assert again["fits"], err
    assert again["changes"] == [] or goal == "fast"
    tokens = "actor.mb_spec.max_tokens_per_mb"
    assert planned(again).get(tokens, 1 << 30) >= planned(answer).get(tokens, 0)


@pytest.mark.parametrize("key", sorted(WRITABLE_KEYS))
def test_every_writable_key_exists_in_some_release(key: str) -> None:
    """The frozen list holds no key that AReaL never had."""
    assert schema.versions_with(key)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("0.3.0", "0.3.1"),
        ("0.3.2", "0.3.1"),
        ("0.3.3", "0.3.1"),
        ("0.4.0", "0.3.4"),
        ("0.5.0", "0.4.1"),
        ("0.5.4", "0.5.3"),
        ("1.0.1", "1.0.0"),
        ("v1.0.3", "1.0.3"),
        ("1.0.4.post1", "1.0.4"),
    ],
)
def test_a_release_between_two_known_ones_reads_as_the_older(asked: str, found: str) -> None:
    """Keys only ever appear: the older neighbour's keys exist in the release asked for."""
    assert versions.pick(asked) == found


@pytest.mark.parametrize("asked", ["2.0.0", "1.1.0", "0.2.0", "latest"])
def test_unknown_releases_are_refused_with_the_known_ones(asked: str) -> None:
    """A release of another series is an error that lists the known ones."""
    status, _, err = memfit("check", "h800", grpo(**BACKENDS), ["--framework-version", asked])

    assert status == 2
    assert "1.0.4" in err
    assert "Traceback" not in err


def test_storage_follows_the_field_not_the_number() -> None:
    """The wheel 1.0.4 stores fp32 by default, every tag bf16; a value in the config wins over both."""
    moments = {}
    for name, changes, options in (
        ("wheel", {}, ["--framework-version", "1.0.4"]),
        ("tag", {}, ["--framework-version", "1.0.3"]),
        ("said", {"actor__optimizer_dtype": "bfloat16"}, ["--framework-version", "1.0.4"]),
    ):
        _, answer, err = memfit("check", "h800", grpo(**BACKENDS, **changes), options)
        assert answer, err
        moments[name] = phase(answer, "optimizer_step")["components"]["optimizer_states"]

    assert moments["wheel"] == 2 * moments["tag"] == 2 * moments["said"]


# -- layouts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "server", "trainer", "colocated"),
    [
        ("sglang.d4p1t1+d4p1t1", 4, 4, False),
        ("sglang:d4t2+fsdp:d8c2", 8, 16, False),
        ("vllm:d2t4+fsdp:d4", 8, 4, False),
        ("sglang:d8|fsdp:d8", 8, 8, True),
        ("sglang.d1t1p1+d7p1t1", 1, 7, False),
        ("d8p1t1", None, 8, False),
        ("fsdp:d4", None, 4, False),
    ],
)
def test_layouts_are_read(text: str, server: int | None, trainer: int, colocated: bool) -> None:
    """Both spellings, one side or two, apart or on the same GPUs."""
    layout = allocation.mode(text)

    assert (layout.server and layout.server.world, layout.trainer.world, layout.colocated) == (
        server,
        trainer,
        colocated,
    )


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("sglang:d4+megatron:d4", NotModelled, "megatron"),
        ("sglang:d4+megatron:(attn:d4p2t2|ffn:d2p2e4)", NotModelled, "megatron"),
        ("sglang:d4+archon:d4", NotModelled, "archon"),
        ("sglang:d4+fsdp:d2p2", NotModelled, "pipeline"),
        ("sglang:d4+fsdp:d2t2", NotModelled, "tensor"),
        ("sglang:d4", NotModelled, "servers alone"),
        ("sglang:d4+", ConfigError, "must name"),
        ("sglang:d4+d2+d2", ConfigError, "must name"),
        ("trt:d4+fsdp:d4", ConfigError, "not a layout"),
        ("sglang:d4+fsdp:x4", ConfigError, "not a layout"),
        ("sglang:d0+fsdp:d4", ConfigError, "size of 0"),
    ],
)
def test_layouts_that_are_wrong_or_not_modelled_are_refused(text: str, error: type[Exception], says: str) -> None:
    """Each refusal says what it is about; engines that are not modelled are never guessed."""
    with pytest.raises(error, match=says):
        allocation.mode(text)


@pytest.mark.parametrize(
    ("layout", "gpus", "shares"),
    [
        ({"allocation_mode": "sglang.d4p1t1+d4p1t1"}, 8, False),
        ({"allocation_mode": "sglang.d4p1t1+d4p1t1"}, 4, True),
        ({"allocation_mode": "sglang:d1+fsdp:d1"}, 1, True),
        (BACKENDS, 8, False),
        (BACKENDS, 6, True),
    ],
)
def test_too_few_gpus_are_shared(layout: dict[str, Any], gpus: int, shares: bool) -> None:
    """A local launch deals its GPUs in turn: where they are too few, server and trainer meet, and the report says so."""
    values = grpo(**layout, cluster__n_gpus_per_node=gpus, sglang__mem_fraction_static=0.3)
    _, answer, err = memfit("check", "h800", values)

    assert answer, err
    assert (phase(answer, "update_actor")["processes"]["engine"] > 0) == shares
    assert any("share GPUs" in warning for warning in answer["warnings"]) == shares


def test_check_says_what_a_launch_needs_to_start() -> None:
    """On a shared GPU NCCL would refuse, whatever fits: the verdict names the value that it was made with."""
    values = grpo(**ERAS["0.5.3"], cluster__n_gpus_per_node=4, sglang__mem_fraction_static=0.3)
    _, answer, err = memfit("check", "h800", values)

    assert any(w.startswith("actor.weight_update_mode=disk is needed") for w in answer["warnings"]), err
    assert planned(memfit("plan", "h800", values)[1])["actor.weight_update_mode"] == "disk"


def test_a_server_started_after_the_trainer_takes_less() -> None:
    """SGLang's share is of what is free when it starts: up to 0.5 the launcher starts it first, the controller last."""
    engine = {}
    for version, layout in (("0.5.3", ERAS["0.5.3"]), ("1.0.3", BACKENDS)):
        values = grpo(**layout, cluster__n_gpus_per_node=4, sglang__mem_fraction_static=0.5)
        _, answer, err = memfit("check", "h800", values, ["--framework-version", version])
        assert answer, err
        engine[version] = phase(answer, "rollout")["processes"]["engine"]

    assert engine["0.5.3"] - engine["1.0.3"] > GIB


def test_colocated_servers_leave_only_with_the_memory_saver() -> None:
    """With enable_offload alone SGLang frees nothing; with its memory saver the trainer has the GPU to itself."""
    both = {
        "rollout__backend": "sglang:d8",
        "actor__backend": "fsdp:d8",
        "rollout__scheduling_strategy__type": "colocation",
        "rollout__scheduling_strategy__target": "actor",
        "enable_offload": True,
        "actor__weight_update_mode": "disk",
    }
    engine = []
    for saver in (False, True):
        _, answer, err = memfit("check", "h800", grpo(**both, sglang__enable_memory_saver=saver))
        assert answer, err
        engine.append(phase(answer, "update_actor")["processes"]["engine"])

    assert engine[0] > 40 * GIB
    assert engine[1] < 3 * GIB
    _, answer, err = memfit("plan", "h800", grpo(**both))
    assert planned(answer).get("sglang.enable_memory_saver") is True, err


# -- input that is wrong --------------------------------------------------------------------------------------------
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layout larger than the launch": ({"allocation_mode": "sglang:d4+fsdp:d16"}, "16 GPUs, and the launch has 8"),
    "two nodes that do not add up": (
        {"allocation_mode": "sglang:d4+fsdp:d4", "cluster__n_nodes": 2},
        "refuse that",
    ),
    "no layout": ({}, "no layout"),
    "one backend": ({"rollout__backend": "sglang:d4"}, "actor.backend is not"),
    "limit below the longest sequence, pinned": (
        {**BACKENDS, "actor__mb_spec__max_tokens_per_mb": 1024, "memfit__pin": ["actor.mb_spec.max_tokens_per_mb"]},
        "actor.mb_spec.max_tokens_per_mb=2048",
    ),
    "a batch that the ranks do not divide": ({**BACKENDS, "train_dataset__batch_size": 10}, "batch_size=8"),
    "a request longer than the server takes": (
        {**BACKENDS, "sglang__context_length": 1024},
        "sglang.context_length=2048",
    ),
    "no model": ({**BACKENDS, "actor__path": None}, "actor.path is not set"),
    "a text for a number": ({**BACKENDS, "gconfig__max_new_tokens": "many"}, "not a whole number"),
    "a share above one": ({**BACKENDS, "sglang__mem_fraction_static": 1.5}, "between 0.0 and 1.0"),
    "an optimizer that AReaL lacks": ({**BACKENDS, "actor__optimizer__type": "lion"}, "adam_bf16"),
    "a storage type that AReaL lacks": (
        {**BACKENDS, "actor__optimizer_dtype": "float16"},
        "is not one of float32, fp32, bfloat16",
    ),
    "colocation without offload": (
        {**BACKENDS, "rollout__scheduling_strategy__type": "colocation"},
        "enable_offload=true",
    ),
    "Megatron": ({"rollout__backend": "sglang:d4", "actor__backend": "megatron:d4"}, "megatron is not modelled"),
    "a key of another release": ({"allocation_mode": "sglang.d4+d4", "sglang__mem_fraction": 0.8}, "mem_fraction"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str) -> None:
    """Exit status 2, one message that names the key and the fix, no traceback."""
    changes, says = BAD[case]
    status, _, err = memfit("plan", "h800", grpo(**changes))

    assert status in (2, 3)
    assert says in err
    assert "Traceback" not in err


def test_a_key_that_the_release_does_not_have_is_refused() -> None:
    """actor.optimizer_dtype came with the wheel 1.0.4: for an older release it is an error that says so."""
    values = grpo(**ERAS["0.5.3"], actor__optimizer_dtype="bfloat16")
    status, _, err = memfit("check", "h800", values, ["--framework-version", "0.5.3"])

    assert status == 2
    assert "areal 0.5.3 has no key actor.optimizer_dtype" in err
    assert "1.0.4" in err


# -- recognising ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        ({"actor": {"path": "x", "mb_spec": {}}, "gconfig": {}}, True),
        ({"actor": {"path": "x"}, "rollout": {"backend": "sglang:d1"}}, True),
        ({"model": {"path": "x", "mb_spec": {}}, "allocation_mode": "d8"}, True),
        ({"actor_rollout_ref": {"actor": {}}, "actor": {"path": "x"}, "rollout": {}}, False),
        ({"model": {"hidden": 8}, "trainer": {}}, False),
        ({"actor": "someone"}, False),
        ({}, False),
    ],
)
def test_only_areal_configs_are_claimed(config: dict[str, Any], claimed: bool) -> None:
    """The shape of AReaL's sections decides; verl's configs and foreign ones are left alone."""
    assert ArealAdapter().recognises(config) == claimed
    if claimed:
        assert registry.recognise(config).name == "areal"


def test_of_config_needs_nothing_installed() -> None:
    """A config without any layout is one of before 1.0.3, which began to require backends; a bare backend is older."""
    assert versions.of_config(View({"actor": {"path": "x", "backend": "fsdp"}})) == "0.3.4"
    assert versions.of_config(View({"actor": {"path": "x"}})) == versions.BEFORE_BACKENDS


def test_sections_that_the_config_lacks_are_never_written() -> None:
    """AReaL builds an engine for a section ``ref`` or ``critic``: none is offered a knob unless it stands there."""
    config = {
        "actor": {"path": "Qwen/Qwen2.5-7B-Instruct", "mb_spec": {"max_tokens_per_mb": 8192}},
        "experiment_name": "x",
    }
    config |= {
        "rollout": {"backend": "sglang:d4"},
        "gconfig": {"max_new_tokens": 1024},
        "train_dataset": {"max_length": 1024},
    }
    config["actor"]["backend"] = "fsdp:d4"  # type: ignore[index]
    from hydra_plugins.memfit.base.settings import Settings
    from hydra_plugins.memfit.hardware.resolve import resolve
    from hydra_plugins.memfit.model.resolve import resolve_model
    from hydra_plugins.memfit.planning.context import Context

    context = Context(
        hardware=resolve("h200", environ={}),
        settings=Settings(),
        resolve_model=lambda path: resolve_model(path, environ={}),
        gpus_per_node=8,
    )
    keys = {knob.key.split(".")[0] for knob in ArealAdapter().problem(config, context).knobs}

    assert keys <= set(config)

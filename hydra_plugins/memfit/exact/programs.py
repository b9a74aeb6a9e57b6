"""The jitted programs of a GRPO run: the training step, prefill and one decode step. Shapes only; imports jax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hydra_plugins.memfit.exact.decoder import MASKED, Decoder, Tree, partition, shapes
from hydra_plugins.memfit.exact.spec import Program, Slice

_MOMENTS = {"lion": ("mu",), "adamw": ("mu", "nu"), "sgd": ()}
_POLICIES = {
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
}


def lower(program: Program) -> Any:
    """Return the lowered program, ready for ``.compile()``; nothing is allocated."""
    mesh = _mesh(program.slice, program.mesh)
    decoder = Decoder(program.architecture, mesh, checkpoint_layers=program.remat == "layer")
    params = _place(shapes(program.architecture), mesh)
    build = {"train_step": _lower_train, "prefill": _lower_prefill, "decode": _lower_decode, "probe": _lower_probe}
    return build[program.kind](program, decoder, params, mesh)


def _mesh(place: Slice, dims: tuple[int, int, int]) -> Mesh:
    described = topologies.get_topology_desc(
        topology_name=place.topology,
        platform="tpu",
        chip_config_name=place.chip_config,
        chips_per_host_bounds=place.chips_per_host,
    )
    devices = list(described.devices)
    if dims[0] > 1:  # dp across hosts: keep each replica's fsdp group on neighbouring devices
        grid = np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(dims)
    else:
        grid = mesh_utils.create_device_mesh(dims, devices=devices)
    return Mesh(grid, ("dp", "fsdp", "tp"))


def _place(tree: Tree, mesh: Mesh) -> Any:
    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        sharding = NamedSharding(mesh, partition(tuple(k.key for k in path)) if path[-1].key != "embedding" else _EMBED)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(put, tree)


_EMBED = PartitionSpec("fsdp", "tp")


class _Rows:
    """Shapes of per-sequence arrays, their rows spread over all devices of the mesh."""

    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.count = program.sequences_per_device * program.slice.devices
        self.sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def __call__(self, dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.count, *dims), dtype, sharding=self.sharding)


def _lower_train(program: Program, decoder: Decoder, params: Any, mesh: Mesh) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = {"step": counter, "params": params} | dict.fromkeys(_MOMENTS[program.optimizer], params)
    if program.accumulate:
        state |= {"micro_step": counter, "accumulated": params}
    row, length = _Rows(program, mesh), program.tokens
    batch = {name: row(jnp.int32, length) for name in ("tokens", "valid", "labels")}
    batch |= {"advantages": row(jnp.float32), "total": counter}
    step = _training_step(decoder, program)
    return jax.jit(step, donate_argnums=0).lower(state, batch)


def _training_step(decoder: Decoder, program: Program) -> Any:
    def loss(params: Any, batch: Tree) -> Any:
        return _policy_loss(decoder, params, batch)

    if program.remat in _POLICIES:
        loss = jax.checkpoint(loss, policy=_POLICIES[program.remat])
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: Tree, batch: Tree) -> Any:
        (_, metrics), grads = gradient(state["params"], batch)
        if not program.accumulate:
            return _apply(state, grads, program.optimizer), metrics
        held = jax.tree.map(jnp.add, state["accumulated"], grads)
        state = {**state, "accumulated": held, "micro_step": state["micro_step"] + 1}
        return jax.lax.cond(
            state["micro_step"] >= 4, lambda s: _flush(s, program.optimizer), lambda s: s, state
        ), metrics

    return step


def _flush(state: Tree, optimizer: str) -> Any:
    mean = jax.tree.map(lambda g: g / 4, state["accumulated"])
    state = _apply(state, mean, optimizer)
    zeros = jax.tree.map(jnp.zeros_like, state["accumulated"])
    return {**state, "accumulated": zeros, "micro_step": jnp.zeros_like(state["micro_step"])}


def _policy_loss(decoder: Decoder, params: Any, batch: Tree) -> Any:
    """Return the clipped policy loss of GRPO; everything with a vocabulary axis stays in bf16, unchunked."""
    tokens, mask = batch["tokens"], batch["labels"][:, 1:]
    length = tokens.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    logits, _ = decoder.logits(params, tokens, positions, _causal(length))
    logits = logits[:, :-1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, 1:, None], axis=-1)[..., 0]
    share = jax.nn.softmax(logits, axis=-1)
    entropy = -jnp.sum(share * jnp.log(share + 1e-9), axis=-1)
    ratio = jnp.exp(chosen - jax.lax.stop_gradient(chosen))
    gain = batch["advantages"][:, None]
    worst = -jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.3) * gain)
    count = jnp.maximum(mask.sum(-1), 1)
    metrics = {"log_probs": jax.lax.stop_gradient(chosen), "entropy": ((entropy * mask).sum(-1) / count).mean()}
    return (worst * mask).sum() / batch["total"], metrics


def _causal(length: int) -> Any:
    return jnp.triu(jnp.full((length, length), MASKED, jnp.float32), 1)


def _apply(state: Tree, grads: Any, optimizer: str) -> dict[str, Any]:
    """Return the state after one step: global norm clipped to 1, then the optimizer with its weight decay."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: jnp.where(norm < 1.0, g, g / norm), grads)
    step = state["step"] + 1
    rate = 1e-6 * jnp.minimum(step, 10) / 10
    update = {"lion": _lion, "adamw": _adamw, "sgd": _sgd}[optimizer]
    return {**state, "step": step, **update(state, grads, rate, step)}


def _lion(state: Tree, grads: Any, rate: Any, step: Any) -> dict[str, Any]:
    del step

    def move(p: Any, m: Any, g: Any) -> Any:
        return p - rate * (jnp.sign(0.9 * m + 0.1 * g) + 1e-8 * p)

    return {
        "params": jax.tree.map(move, state["params"], state["mu"], grads),
        "mu": jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g, state["mu"], grads),
    }


def _adamw(state: Tree, grads: Any, rate: Any, step: Any) -> dict[str, Any]:
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["mu"], grads)
    nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["nu"], grads)

    def move(p: Any, m: Any, v: Any) -> Any:
        first, second = m / (1 - 0.9**step), v / (1 - 0.999**step)
        return p - rate * (first / (jnp.sqrt(second) + 1e-8) + 1e-4 * p)

    return {"params": jax.tree.map(move, state["params"], mu, nu), "mu": mu, "nu": nu}


def _sgd(state: Tree, grads: Any, rate: Any, step: Any) -> dict[str, Any]:
    del step
    return {"params": jax.tree.map(lambda p, g: p - rate * g, state["params"], grads)}


def _cache(program: Program, row: _Rows, length: int) -> dict[str, Any]:
    arch = program.architecture
    heads = (arch.num_key_value_heads, length, arch.head_dim)
    layer = {"k": row(jnp.bfloat16, *heads), "v": row(jnp.bfloat16, *heads), "end": row(jnp.int32)}
    return {f"layers_{i}": layer for i in range(arch.num_hidden_layers)}


def _lower_prefill(program: Program, decoder: Decoder, params: Any, mesh: Mesh) -> Any:
    row, length = _Rows(program, mesh), program.tokens - program.new_tokens

    def prefill(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        return decoder.logits(params, tokens, positions, _causal(length), cache)

    ids = row(jnp.int32, length)
    return jax.jit(prefill).lower(params, ids, ids, _cache(program, row, length))


def _lower_decode(program: Program, decoder: Decoder, params: Any, mesh: Mesh) -> Any:
    row, length = _Rows(program, mesh), program.tokens

    def decode(cache: Any, params: Any, tokens: Any, positions: Any, valid: Any) -> Any:
        visible = jnp.where(valid > 0, 0.0, MASKED)[:, None, None]
        logits, cache = decoder.logits(params, tokens, positions, visible, cache)
        return cache, jnp.argmax(logits[:, -1], axis=-1)

    one = row(jnp.int32, 1)
    return jax.jit(decode, donate_argnums=0).lower(
        _cache(program, row, length), params, one, one, row(jnp.int32, length)
    )


def _lower_probe(program: Program, decoder: Decoder, params: Any, mesh: Mesh) -> Any:
    """Return a program that no device can hold (96 GiB in, 96 GiB out a device): its refusal names the compiler's limit."""
    del program, decoder, params
    rows = mesh.devices.size * (3 << 15)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((rows, 1 << 20), jnp.int8, sharding=sharding))

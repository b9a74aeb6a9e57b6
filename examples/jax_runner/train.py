"""A JAX runner with a Hydra config: trains a small decoder on sequences of consecutive numbers.

python train.py                                          a run on this machine
python train.py +hardware=v4-16 memfit.framework=jax     the same, planned by memfit for a TPU slice
"""

from __future__ import annotations

import hydra
import jax
import jax.numpy as jnp
import model
from omegaconf import DictConfig


def batches(cfg: DictConfig, vocabulary: int) -> jax.Array:
    """Return all token sequences of the run: (steps, passes, sequences, tokens)."""
    train = cfg.train
    rows = train.per_device_batch * jax.device_count()
    shape = (train.steps, train.accumulate, rows, 1)
    start = jax.random.randint(jax.random.key(train.seed), shape, 0, vocabulary)
    return (start + jnp.arange(train.max_length)) % vocabulary


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Train, and print the loss of each optimizer step."""
    config = model.read_config(cfg.model.path)
    params = model.init(config, jax.random.key(cfg.train.seed))
    moments = (jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def loss(params: model.Tree, tokens: jax.Array) -> jax.Array:
        scores = model.logits(params, tokens, config)[:, :-1].astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1).mean()

    @jax.jit
    def step(params: model.Tree, moments: tuple[model.Tree, model.Tree], passes: jax.Array, count: jax.Array):
        def accumulate(held, tokens):
            value, grads = jax.value_and_grad(loss)(params, tokens)
            return (held[0] + value, jax.tree.map(jnp.add, held[1], grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (total, grads), _ = jax.lax.scan(accumulate, zero, passes)
        grads = jax.tree.map(lambda g: g / passes.shape[0], grads)
        return *adam(params, moments, grads, count, cfg.train.learning_rate), total / passes.shape[0]

    data = batches(cfg, config["vocab_size"])
    print(f"{data.shape[1]} passes of {data.shape[2]} sequences, {data.shape[1] * data.shape[2]} in an optimizer step")
    for i, passes in enumerate(data):
        params, moments, value = step(params, moments, passes, jnp.asarray(i + 1.0))
        print(f"step {i} loss {float(value):.4f}")


def adam(params, moments, grads, count, rate):
    """Return parameters and moments after one Adam step."""
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, moments[1], grads)

    def move(p, m, v):
        return p - rate * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.99**count)) + 1e-8)

    return jax.tree.map(move, params, mean, square), (mean, square)


if __name__ == "__main__":
    main()

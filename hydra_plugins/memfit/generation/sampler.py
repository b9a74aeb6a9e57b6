"""Random choices that belong to a sequence, not to the batch in which it is generated.

``model.generate`` draws for a whole batch from one generator, so the same question gets other answers in another batch.
Here each sequence has a generator of its own, seeded by the run's seed, its question and its number. Choosing the largest
of ``score - log(Exp(1))`` is a draw from ``softmax(score)`` (the same trick as ``torch.multinomial``'s own kernel), so the
distribution is that of ``do_sample=True``.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError

# Name in the generation config, class in transformers, value that does nothing; in the order in which transformers runs them.
_WARPERS = (
    ("temperature", "TemperatureLogitsWarper", 1.0),
    ("top_k", "TopKLogitsWarper", 0),
    ("top_p", "TopPLogitsWarper", 1.0),
    ("min_p", "MinPLogitsWarper", None),
    ("typical_p", "TypicalLogitsWarper", 1.0),
    ("epsilon_cutoff", "EpsilonLogitsWarper", 0.0),
)
# The defaults of transformers, which 5.x keeps out of the config until the call.
DEFAULTS = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}
_LEAST_NOISE = 2.0**-25
"""A draw of exactly 0 stands for anything below the step of a 24-bit float; its logarithm must not be infinite."""
_UNSUPPORTED = ("eta_cutoff", "watermarking_config", "penalty_alpha", "dola_layers", "assistant_early_exit")


def sequence_seed(seed: int, question: int, sequence: int) -> int:
    """Return the 63-bit seed of one sequence; different for each (seed, question, sequence), the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{question}/{sequence}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class OwnDraws:
    """A logits processor that leaves only the token that each row's own generator draws: the last one in the chain."""

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        self._generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores with every row's own exponential noise taken off, so that argmax is a draw."""
        import torch

        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.clamp_(min=_LEAST_NOISE).log_().neg_().add_(scores)


def sampling_chain(config: Any, seeds: Sequence[int], device: Any) -> list[Any]:
    """Return the processors that make greedy search sample as ``config`` asks: its warpers, then `OwnDraws`.

    Raises `ConfigError` for a setting whose meaning would be lost.
    """
    transformers: Any = importlib.import_module("transformers")
    lost = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if lost:
        raise ConfigError(
            f"generation in chunks cannot keep {', '.join(lost)}. Leave it out, or call model.generate yourself. "
            f"Known: {', '.join(name for name, _, _ in _WARPERS)}."
        )
    chain = []
    for name, warper, neutral in _WARPERS:
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            chain.append(getattr(transformers, warper)(value))
    return [*chain, OwnDraws(seeds, device)]


def make_greedy(config: Any) -> None:
    """Turn sampling off in ``config`` and set what only sampling reads to values that do nothing."""
    config.do_sample = False
    for name, _, neutral in _WARPERS:
        if hasattr(config, name):
            setattr(config, name, DEFAULTS.get(name, neutral))

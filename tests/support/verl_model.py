"""A checkpoint directory without weights: enough for verl to build its model config from, with no network."""

from __future__ import annotations

import json
from pathlib import Path

SHAPES = {
    # architecture of the published checkpoints: https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/config.json
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip


def checkpoint_without_weights(directory: Path, shape: str) -> Path:
    """Write config.json of a Qwen2.5 and a one-word tokenizer into ``directory``; returns it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16", **SHAPES[shape],
    }  # fmt: skip
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>")).save(str(directory / "tokenizer.json"))
    return directory

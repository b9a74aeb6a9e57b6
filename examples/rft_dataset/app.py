"""Make a rejection fine-tuning data set: sample many answers to each question and keep the right ones.

python app.py                                      all questions and all answers at once
python app.py +hardware=auto                       as many at once as the GPU of this machine holds
python app.py +hardware=a40 memfit.report=full     planned for an A40, and told why
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from hydra_plugins.memfit.generation.chunked import iterate_in_chunks

ALPHABET = ["<pad>", "<s>", "</s>", *"0123456789+=?"]


def sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Return ``count`` sums of two digits and their results."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return [(f"{a}+{b}=", str(a + b)) for a, b in pairs]


def make_tokenizer() -> Any:
    """Return a tokenizer of single characters."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )


def load(cfg: DictConfig) -> tuple[Any, Any]:
    """Return model and tokenizer: taught on the spot where the folder holds a config alone, else loaded."""
    options = {"dtype": getattr(torch, cfg.model.dtype), "attn_implementation": cfg.model.attn_implementation}
    if cfg.model.practice_steps:
        torch.manual_seed(cfg.seed)  # the weights are drawn below: the same seed is the same model
        config = transformers.AutoConfig.from_pretrained(cfg.model.path)
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
        tokenizer = make_tokenizer()
        practise(model, tokenizer, steps=cfg.model.practice_steps)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(cfg.model.path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def practise(model: Any, tokenizer: Any, *, steps: int) -> None:
    """Teach the model sums, on the CPU, in a few seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        texts = [question + answer + "</s>" for question, answer in sums(64, seed=step + 1)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :4] = -100  # the question itself is not learned
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Sample, judge, and write what is right."""
    model, tokenizer = load(cfg)
    questions = sums(cfg.generation.num_questions, seed=10_000 + cfg.seed)
    prompts = [tokenizer(question, add_special_tokens=False)["input_ids"] for question, _ in questions]
    settings = cfg.generation
    sampled, kept = 0, set()
    with Path(cfg.output).open("w") as file:
        for answer in iterate_in_chunks(
            model,
            prompts,
            num_return_sequences=settings.num_return_sequences,
            micro_batch_size=settings.micro_batch_size,
            chunk_size=settings.chunk_size,
            seed=cfg.seed,
            pad_token_id=tokenizer.pad_token_id,
            progress=True,
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.do_sample,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        ):
            sampled += 1
            question, truth = questions[answer.question]
            text = tokenizer.decode(answer.tokens, skip_special_tokens=True).replace(" ", "")
            if text == truth and (question, text) not in kept:
                kept.add((question, text))
                file.write(json.dumps({"question": question, "answer": text}) + "\n")
    print(
        f"{sampled} answers to {len(questions)} questions, {settings.micro_batch_size} questions and "
        f"{settings.chunk_size} answers at once: {len(kept)} kept in {cfg.output}"
    )


if __name__ == "__main__":
    main()

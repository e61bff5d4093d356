"""Compare two `transformers` causal models on a text: the loop to copy.

``python examples/transformers_compare.py BASE TEST text.txt`` takes names or folders of models;
without arguments it makes two tiny ones with random weights, the second rounded to 8 bits, and
needs no network. Install with ``pip install "klfast[transformers]"``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import klfast

CONTEXT, BATCH = 512, 1


def compare(base: Any, test: Any, tokens: torch.Tensor) -> klfast.Evaluation:
    """Logits of both models for each batch of (texts, positions), measured and forgotten."""
    evaluation = klfast.Evaluation()
    for batch in tokens.split(BATCH):
        batch = batch.to(base.device)
        # Row i predicts token i + 1. Logits stay on their device, in their dtype.
        p = base(batch).logits[:, :-1]
        q = test(batch.to(test.device)).logits[:, :-1].to(p.device)
        evaluation.update(p, q, targets=batch[:, 1:])
    return evaluation


def compare_states(base: Any, test: Any, tokens: torch.Tensor) -> klfast.Evaluation:
    """The same from hidden states: no row of logits is ever held for the whole batch."""
    evaluation = klfast.Evaluation()
    for batch in tokens.split(BATCH):
        p, q = (
            klfast.LinearLogits(
                model.model(batch.to(model.device)).last_hidden_state[:, :-1], model.lm_head.weight
            )
            for model in (base, test)
        )
        evaluation.update(p, q, targets=batch[:, 1:])
    return evaluation


def tiny_models() -> tuple[Any, Any, torch.Tensor]:
    """Two models that need no network, and tokens for them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    test = LlamaForCausalLM(config).eval()
    test.load_state_dict(base.state_dict())
    with torch.no_grad():
        for weight in test.parameters():
            step = weight.abs().max() / 127
            weight.copy_((weight / step).round() * step)
    return base, test, torch.randint(0, config.vocab_size, (4, 32))


def models_of(base: str, test: str, text: str) -> tuple[Any, Any, torch.Tensor]:
    """Two models by name, and a text cut into contexts."""
    models = [
        AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto").eval()
        for name in (base, test)
    ]
    words = AutoTokenizer.from_pretrained(base)(Path(text).read_text(), return_tensors="pt")
    whole = words.input_ids[0]
    count = len(whole) // CONTEXT * CONTEXT
    return models[0], models[1], whole[:count].reshape(-1, CONTEXT)


def main(arguments: list[str]) -> None:
    base, test, tokens = models_of(*arguments) if arguments else tiny_models()
    with torch.inference_mode():
        evaluation = compare(base, test, tokens)
        same = compare_states(base, test, tokens).summary().value("kl.mean")
    print(evaluation)
    print(f"\nmean KL {evaluation.summary().value('kl.mean'):.4g}, from hidden states {same:.4g}")


if __name__ == "__main__":
    main(sys.argv[1:])

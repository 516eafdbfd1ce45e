"""The sample texts, against greedy decoding step by step."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbq.evaluation.generation import generate_text


@torch.no_grad()
def greedy_without_repeated_trigrams(model, ids: list[int], num_tokens: int) -> list[int]:
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        trigrams = set(zip(ids, ids[1:], ids[2:], strict=False))
        allowed = [token for token in range(len(logits)) if (*ids[-2:], token) not in trigrams]
        ids = [*ids, max(allowed, key=lambda token: logits[token].item())]
    return ids


def test_the_most_likely_text_without_repeated_trigrams(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    prompt = "A class is"
    expected = greedy_without_repeated_trigrams(model, tokenizer(prompt)["input_ids"], 12)
    text = generate_text(model, tokenizer, prompt, num_tokens=12)
    assert text.startswith(prompt)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)

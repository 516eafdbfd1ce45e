"""A short text written by the model: what a perplexity feels like."""

import torch
from torch import nn


@torch.no_grad()
def generate_text(model: nn.Module, tokenizer, prompt: str, num_tokens: int = 48) -> str:
    """Return `prompt` and the `num_tokens` tokens that the model finds most likely after it, never a trigram twice.

    Without that rule a small model says one word for ever, quantized or not, and the two texts tell nothing.

    Args:
        model: a causal language model with `generate`.
        tokenizer: the model's own.
        prompt: not empty, best without a space at its end: tokenizers join the space to the word after it.
        num_tokens: at least 1; the text ends earlier at an end-of-text token.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        no_repeat_ngram_size=3,
        use_cache=True,
        pad_token_id=pad,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)

"""Text that a model writes, as it comes."""

from collections.abc import Iterator
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from cbq.errors import InputError
from cbq.models.loading import LoadedModel

TIMEOUT_SECONDS = 600  # of a token: then the thread that writes has died


def stream_text(
    loaded: LoadedModel, prompt: str, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Yield what a model writes after `prompt`, a piece a token; an empty piece where a letter is not whole yet.

    Args:
        loaded: the model.
        prompt: not empty, best without a space at its end: tokenizers join the space to the word after it.
        max_tokens: at least 1; fewer where the model ends its text.
        temperature: 0 takes the likeliest token, never a trigram twice: small models say one word for ever.
        seed: of the sampling.

    Raises:
        InputError: the prompt has no token, or more than the model's context has room for.
    """
    device = loaded.model.device
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(device)
    num_prompt = inputs.input_ids.shape[1]
    if not 0 < num_prompt <= loaded.context - max_tokens:
        raise InputError(
            f"prompt must have at least 1 token, and with max_tokens={max_tokens} fit the model's context of "
            f"{loaded.context}: it has {num_prompt}"
        )
    streamer = PieceStreamer(loaded.tokenizer, skip_prompt=True, timeout=TIMEOUT_SECONDS, skip_special_tokens=True)
    pad = loaded.tokenizer.pad_token_id
    how = {"do_sample": True, "temperature": temperature} if temperature else {"no_repeat_ngram_size": 3}
    options = {"do_sample": False, "max_new_tokens": max_tokens, "use_cache": True} | how
    options["pad_token_id"] = loaded.tokenizer.eos_token_id if pad is None else pad
    torch.manual_seed(seed)
    arguments = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "streamer": streamer}
    failures: list[BaseException] = []

    def write() -> None:
        try:
            loaded.model.generate(**arguments, **options)
        except BaseException as error:  # of the other thread: it is raised where the text is read
            failures.append(error)
            streamer.end()

    thread = Thread(target=write, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


class PieceStreamer(TextIteratorStreamer):
    """Hands on a piece for every token: transformers' own waits for whole words."""

    def put(self, value: torch.Tensor) -> None:
        self.token_cache.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if self.next_tokens_are_prompt:  # kept, because tokenizers drop the space before a first word
            self.next_tokens_are_prompt = False
            self.written = text
            return
        whole = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(self.written) :]
        self.written += whole
        self.on_finalized_text(whole)

    def end(self) -> None:
        self.on_finalized_text("", stream_end=True)

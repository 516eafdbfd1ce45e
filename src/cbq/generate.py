"""`cbq generate`: what a finished model writes, and what the full-precision model wrote."""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cbq.checkpoint import find_checkpoint, load_checkpoint
from cbq.errors import InputError, check_flag, check_number, check_seed, check_text
from cbq.models.loading import LoadedModel
from cbq.models.streaming import stream_text
from cbq.placement import fits
from cbq.report.summary import CONTROL_CHARACTERS

SMALLEST_TEMPERATURE = 1e-3  # below it logits overflow when they are divided by it


class Generate:
    """Continues a prompt.

    Args:
        checkpoint: a run's folder, or its checkpoint.
        prompt: what to continue.
        max_tokens: of the continuation.
        temperature: 0: the likeliest token.
        seed: of the sampling.
        compare: beside what the full-precision model writes.
        load_base: returns the full-precision model; None: it is not known.

    Raises:
        InputError: an option is out of range, or there is no checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        prompt: str,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        compare: bool = False,
        load_base: Callable[[], LoadedModel] | None = None,
    ) -> None:
        check_text("prompt", prompt)
        check_number("max_tokens", max_tokens, least=1)
        if not isinstance(max_tokens, int):
            raise InputError(f"max_tokens must be an integer, got {max_tokens!r}")
        check_number("temperature", temperature)
        if 0 < temperature < SMALLEST_TEMPERATURE:
            raise InputError(f"temperature must be 0, or at least {SMALLEST_TEMPERATURE}, got {temperature!r}")
        check_seed("seed", seed)
        check_flag("compare", compare)
        self.folder = find_checkpoint(checkpoint)
        if compare and load_base is None:
            raise InputError(f"compare=true needs the run that made {self.folder}: its config.yaml names the model")
        self.prompt = prompt
        self.options = {"max_tokens": max_tokens, "temperature": float(temperature), "seed": seed}
        self.load_base = load_base if compare else None
        self.console = Console(highlight=False)

    def run(self) -> dict[str, str]:
        """Print the texts as they come, and return them by the model that wrote them."""
        texts = {"full precision": ""} if self.load_base else {}
        texts["quantized"] = ""
        rates: dict[str, float] = {}
        with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            for name in texts:
                loaded = self.load_base() if name == "full precision" else load_checkpoint(self.folder)
                if torch.cuda.is_available() and fits(loaded.model, torch.device("cuda")):
                    loaded.model.to("cuda")  # a larger one writes faster on the host than block by block
                start, num_tokens = time.perf_counter(), 0
                for piece in stream_text(loaded, self.prompt, **self.options):
                    texts[name] += piece
                    num_tokens += 1
                    live.update(self.table(texts, rates), refresh=self.console.is_terminal)
                # The piece at the end of the stream is no token.
                rates[name] = max(num_tokens - 1, 1) / (time.perf_counter() - start)
            live.update(self.table(texts, rates), refresh=True)
        return texts

    def table(self, texts: dict[str, str], rates: dict[str, float]) -> Table:
        """Return the texts beside each other, with the tokens a second of those that are done."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        cells = []
        for name, text in texts.items():
            speed = f" ({rates[name]:.1f} tokens/s)" if name in rates else ""
            table.add_column(Text(f"{name}{speed}"), overflow="fold", ratio=1)
            clean = CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
            cells.append(Text.assemble((self.prompt, "dim"), clean))
        table.add_row(*cells)
        return table

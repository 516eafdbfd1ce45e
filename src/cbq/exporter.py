"""From a finished model to a folder that an engine loads, proved before it gets its name."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import LongTensor, nn

from cbq.data.corpora import CORPORA
from cbq.errors import InputError, check_flag, check_text, expanded
from cbq.evaluation.comparison import Comparison, compare_logits, token_nll
from cbq.export.card import card
from cbq.export.formats import Format, quantized_schemes
from cbq.export.size import measure
from cbq.models.families import get_blocks
from cbq.models.loading import LoadedModel, PreTrainedModel
from cbq.models.offload import HOST
from cbq.placement import fits

HELD_OUT_TOKENS = 256
CLOSE = 0.01  # of the perplexity, where an engine's arithmetic is not ours to the bit
# Of the distance of our model from full precision, what an engine must at least be away from it: an engine that rounds
# activations a little otherwise is as far from our model as from full precision, but as far from that as ours is.
DISTINCT = 0.5


class Disagreement(RuntimeError):
    """An engine does not compute what the model in memory does."""


class NoExport:
    """Writes nothing."""

    def check(self, model: PreTrainedModel, act_ranges_change: bool = False) -> None:
        """Refuse nothing."""

    def remember(self, model: PreTrainedModel, load_full_precision: Callable[[], LoadedModel]) -> None:
        """Keep nothing."""

    def publish(self, loaded: LoadedModel, default: Path, results: dict) -> None:
        """Do nothing."""


class Export:
    """Writes a finished model in the format of an engine.

    Args:
        format: of the engine.
        out: the folder to write; None: `export` beside the checkpoint. It must not exist.
        verify: load the folder with the engine and compare, before it gets its name.
        verify_segments: of held-out text that are compared on; None: all.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self, format: Format, out: str | None = None, verify: bool = True, verify_segments: int | None = 16
    ) -> None:
        check_text("export.out", out, optional=True)
        check_flag("export.verify", verify)
        if not isinstance(format, Format):
            raise InputError(f"export.format must be a class of cbq.export, got {format!r}: export=<name> chooses one")
        number = isinstance(verify_segments, int) and not isinstance(verify_segments, bool)
        if verify_segments is not None and not (number and verify_segments > 0):
            raise InputError(
                f"export.verify_segments must be an integer of at least 1, or null, got {verify_segments!r}"
            )
        self.format = format
        self.out = out
        self.verify = verify
        self.verify_segments = verify_segments
        self.full_precision: torch.Tensor | None = None
        self.unknown = "it was not measured"  # why, where full precision is None
        self.console = Console(highlight=False)

    def check(self, model: PreTrainedModel, act_ranges_change: bool = False) -> None:
        """Refuse what the format has no place for, before any work is done.

        Args:
            model: its blocks' linears either made quantizable, or fused.
            act_ranges_change: see `Format.check`.

        Raises:
            InputError: the model does not fit, or the folder is there already.
        """
        if self.out is not None:
            check_free(expanded(self.out))
        self.format.check(model, act_ranges_change)

    def remember(self, model: PreTrainedModel, load_full_precision: Callable[[], LoadedModel]) -> None:
        """Keep what full precision computes of the held-out text, where the proof will need it.

        Args:
            model: its blocks' linears either made quantizable, or fused.
            load_full_precision: returns the model that it is quantized from, where it computes; it may raise an
                InputError, which the proof then says.
        """
        if not self.verify or not self.format.is_installed() or self.is_exact(model):
            return
        try:
            loaded = load_full_precision()
            self.full_precision = token_nll(loaded.model, self.segments(loaded))
        except InputError as error:
            self.unknown = str(error)

    def publish(self, loaded: LoadedModel, default: Path, results: dict) -> dict:
        """Write the folder, prove it, and return what results say of it.

        Args:
            loaded: the finished model.
            default: the folder where none is chosen.
            results: of the run that made the model, as far as they are known: for the model card.

        Raises:
            InputError: the model does not fit, or the folder is there already.
            Disagreement: the engine computes something else. There is no folder then.
        """
        folder = expanded(self.out) if self.out else default
        check_free(folder)
        schemes = quantized_schemes(loaded.model)
        with unproved_folder(folder) as unproved:
            with explained(folder):
                self.format.write(loaded.model, loaded.tokenizer, unproved)
            size = measure(unproved, loaded.model, list(schemes))
            self.say(f"export: {size} in {folder}")
            comparison = self.prove(loaded, unproved) if self.verify else None
            notes = self.format.notes(schemes)
            for note in notes:
                self.say(f"note: {note}")
            text = card(results, schemes, size, self.format.loading(schemes), self.proof(comparison), notes)
            with explained(folder):
                (unproved / "README.md").write_text(text, encoding="utf-8")
                check_free(folder)  # still: the proof may have taken minutes
                unproved.rename(folder)
        return {
            "format": self.format.name,
            "folder": str(folder),
            "bytes": size.bytes,
            "bf16_bytes": size.bf16_bytes,
            "verified": asdict(comparison) if comparison else None,
        }

    def prove(self, loaded: LoadedModel, folder: Path) -> Comparison | None:
        """Compare the engine's logits with those of the model in memory, or say that the engine is not installed.

        Raises:
            Disagreement: see `publish`.
        """
        if not self.format.is_installed():
            self.say(f"export: not verified, {self.format.engine} is not installed")
            return None
        schemes = quantized_schemes(loaded.model)
        try:
            engine = self.format.load_engine(folder, schemes, engine_device(loaded.model))
        except (InputError, OSError) as error:
            raise Disagreement(f"{self.format.engine} does not load the export, so it is not kept: {error}") from error
        wrong = [name for name in schemes if not same_weight(loaded.model, engine, name)]
        if wrong:
            raise Disagreement(f"the weights that {self.format.engine} reads for {wrong[0]} are not those of the model")
        segments = self.segments(loaded)
        found = compare_logits(loaded.model, engine, segments, self.full_precision)
        said = self.proof(found)
        exact = self.is_exact(loaded.model)
        close = abs(found.other_perplexity - found.perplexity) <= CLOSE * found.perplexity
        if not close or (exact and found.max_difference):
            raise Disagreement(f"the export does not compute what the model does, so it is not kept. {said}")
        if found.distance is not None and found.other_distance < DISTINCT * found.distance:
            raise Disagreement(f"the export computes what full precision does, so it is not kept. {said}")
        self.say(f"export: {said} ({segments.numel()} tokens)")
        if not exact and found.distance is None:
            self.say(f"export: not compared with full precision: {self.unknown}")
        return found

    def is_exact(self, model: PreTrainedModel) -> bool:
        """Return whether the engine's logits must be the model's to the bit: two kinds of device sum in two orders."""
        same_kind = next(model.parameters()).device.type == engine_device(model).type
        return same_kind and model.dtype == torch.float32 and self.format.is_exact(quantized_schemes(model))

    def segments(self, loaded: LoadedModel) -> LongTensor:
        """Return the segments (N, T) that are compared on, in the tokens of a model."""
        return held_out_segments(loaded)[: self.verify_segments]

    def say(self, line: str) -> None:
        """Print a line whole: a path in two pieces cannot be copied."""
        self.console.print(line, soft_wrap=True)

    def proof(self, found: Comparison | None) -> str:
        """Return what came of a comparison, in words."""
        if found is None:
            return "Not verified."
        said = (
            f"Logits through {self.format.engine} differ from those of cbq by {found.max_difference:.3g} at most and "
            f"{found.mean_difference:.3g} on average; perplexity {found.other_perplexity:.4f} through "
            f"{self.format.engine}, {found.perplexity:.4f} in cbq."
        )
        if found.distance is None:
            return said + " Not compared with full precision." * (found.max_difference > 0)
        return (
            f"{said} Full precision: {found.full_precision_perplexity:.4f}; from it a token's log likelihood is "
            f"{found.other_distance:.3g} away through {self.format.engine}, {found.distance:.3g} in cbq (root mean "
            "square)."
        )


def engine_device(model: PreTrainedModel) -> torch.device:
    """Return where the engine is to compute: where the blocks are kept, if there is room for a second model; else on
    the host."""
    device = next(get_blocks(model).parameters()).device
    return device if device == HOST or fits(model, device) else HOST


def same_weight(model: nn.Module, engine: nn.Module, name: str) -> bool:
    """Return whether an engine's weight of a linear is that of the model, to the bit, where the engine shows it.

    Args:
        model: the finished model.
        engine: the same as the engine loads it.
        name: of the linear.
    """
    found, expected = getattr(engine.get_submodule(name), "weight", None), model.get_submodule(name).weight
    if found is None or not found.is_floating_point() or found.shape != expected.shape:
        return True  # packed still: logits are all that can be compared
    return torch.equal(found.to(expected.device), expected.to(found.dtype))


@contextmanager
def unproved_folder(folder: Path) -> Iterator[Path]:
    """Make a hidden folder of its own beside `folder`, and remove what was not renamed, made parents too."""
    made = [parent for parent in folder.parents if not parent.exists()]
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unproved = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        unproved.chmod(0o755)
    try:
        yield unproved
    finally:
        shutil.rmtree(unproved, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be written.

    Raises:
        InputError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"export.out {folder} cannot be written: {error.strerror or error}") from None


def held_out_segments(loaded: LoadedModel) -> LongTensor:
    """Return segments (N, T) of the text that the package ships for tests, in the tokens of a model."""
    length = min(HELD_OUT_TOKENS, loaded.context)
    return CORPORA["embedded"](None).held_out(loaded.tokenizer, length, length).segments


def check_free(folder: Path) -> None:
    """Refuse a folder that is there: it may be somebody's model.

    Raises:
        InputError: it is.
    """
    with explained(folder):
        there = folder.exists()
    if there:
        raise InputError(f"export.out {folder} is there already: choose another, or remove it")

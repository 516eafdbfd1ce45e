"""The method as one function, on a transformers model in memory: no configuration, no files."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch

from cbq.activations import check_computes, stream_bytes
from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.models.loading import PreTrainedModel
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.none import NoPreprocessing
from cbq.preprocess.statistics import set_act_ranges_
from cbq.quant.rounding import LoRARounding, Rounding
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows
from cbq.report.progress import WindowProgress
from cbq.streams.places import StreamPlacement


def quantize(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    scheme: str | QuantScheme = "w4a4",
    window: int = 2,
    overlap: int | None = None,
    rounding: Callable[[int, int], Rounding] = LoRARounding,
    preprocess: NoPreprocessing | CoarseToFine | None = None,
    loss: ReconstructionLoss | None = None,
    learning_rates: LearningRates | None = None,
    epochs: int = 3,
    batch_size: int = 1,
    accumulate_grad_batches: int = 1,
    activation_cache: str | StreamPlacement = "auto",
    seed: int = 0,
    callbacks: Sequence[L.Callback] = (),
    progress: bool = True,
) -> tuple[PreTrainedModel, list[WindowResult]]:
    """Quantize the linears of a causal language model's blocks by cross-block reconstruction, in place.

    Args:
        model: of a supported family, in full precision, on the device to work on. It is changed, and put into
            evaluation mode without gradients.
        tokens: calibration token ids, (N, T): N segments of T tokens.
        scheme: a `QuantScheme`, or its label: `w4a4`, `w2a16g128`, `w4a4-qkv4`.
        window: blocks a window.
        overlap: blocks that a window shares with the one before it; None is min(1, window - 1).
        rounding: a class of `cbq.quant.rounding`, or anything that makes one from out_features and in_features.
        preprocess: of outliers; none if None.
        loss: Eq. 7 if None.
        learning_rates: of the step sizes; the paper's if None.
        epochs: passes over the segments, a window.
        batch_size: segments a batch.
        accumulate_grad_batches: batches an optimizer step.
        activation_cache: where hidden states are kept: `device`, `host`, `disk` (in the system's folder for temporary
            files), `auto`, which is the first of them with room, or a `StreamPlacement`. The result is the same.
        seed: of everything random.
        callbacks: Lightning callbacks for every window's fit.
        progress: show windows, losses and the time left.

    Returns:
        `model`, which now computes with quantized weights and activations, and what became of each window.
        `generate` works on it, `cbq.save` writes it, `cbq.load` reads it.

    Raises:
        InputError: an argument is out of range, or the model's family is not supported. The model's weights are then
            unchanged.

    Example:
        `model, windows = cbq.quantize(model, tokens, scheme="w2a16", rounding=DenseSTE)`
    """
    scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
    blocks = get_blocks(model)
    plan = SlidingWindows(window, overlap).plan(len(blocks))
    solver = Reconstruction(
        loss or ReconstructionLoss(),
        rounding,
        learning_rates or LearningRates(),
        epochs=epochs,
        batch_size=batch_size,
        accumulate_grad_batches=accumulate_grad_batches,
        seed=seed,
    )
    check_tokens(tokens, model.config.vocab_size)
    own = isinstance(activation_cache, StreamPlacement)
    placement = activation_cache if own else StreamPlacement(activation_cache)
    check_computes(model, blocks, tokens)
    num_bytes = stream_bytes(model, blocks, tokens)
    place = placement.choose(solver.num_streams, num_bytes, model.device, Path(tempfile.gettempdir()))
    L.seed_everything(seed, verbose=False)
    make_quantizable_(model, blocks, scheme)
    model.eval().requires_grad_(False)
    (preprocess or NoPreprocessing()).apply_(model, blocks, tokens, place)
    set_act_ranges_(model, blocks, tokens, place)
    with WindowProgress() as display:
        listeners = [*callbacks, display] if progress else list(callbacks)
        if progress:
            display.start(len(plan), [solver.steps(len(tokens))] * len(plan))
        on_window = display.finish_window if progress else lambda result: None
        return model, reconstruct_(model, blocks, tokens, plan, solver, listeners, on_window, place)


def check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    """Refuse what are no calibration segments.

    Raises:
        InputError: not two dimensions of integers, empty, or an id beyond the vocabulary.
    """
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"tokens must be an integer tensor of shape (segments, tokens), got {describe(tokens)}")
    if not tokens.numel():
        raise InputError(f"tokens must hold at least one segment of one token, got {describe(tokens)}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"tokens must be 0 to {vocab_size - 1}, got {tokens.min().item()} to {tokens.max().item()}")


def describe(tokens: object) -> str:
    """Return what a value is, in a few words."""
    return f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__

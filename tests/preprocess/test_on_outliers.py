"""What each `preprocess=` does to the first two blocks of the model with outliers, against round-to-nearest."""

import copy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from cbq.cli import conf_dir
from cbq.models.loading import LoadedModel, embedded_folder
from cbq.models.outliers import load_with_outliers
from cbq.quant.linear import quant_linears
from cbq.quant.state import QuantState, quant_state
from cbq.quantized import make_quantizable_

# Choice -> a scheme that it is for, and the most error that it may leave of round-to-nearest's.
CHOICES = {
    "omse": ("w4a4", 1.0),
    "omse_weight": ("w2a16", 0.6),
    "percentile": ("w4a4", 1.0),
    "outlier_suppression": ("w4a4", 0.6),
    "os_plus": ("w4a4", 0.6),
    "smoothquant": ("w4a4", 0.6),
    "awq": ("w4a16", 0.6),
    "cfp": ("w4a4", 0.6),
    "cfp_weight": ("w4a16", 1.0),
    "cfp_activation": ("w4a4", 0.6),
    "cfp_omse": ("w4a4", 0.6),
    "best": ("w4a4", 0.4),
}
NUM_BLOCKS, NUM_TOKENS = 2, 64


@pytest.fixture(scope="module")
def first_blocks() -> LoadedModel:
    loaded = load_with_outliers()
    del loaded.blocks[NUM_BLOCKS:]
    loaded.model.config.num_hidden_layers = NUM_BLOCKS
    return loaded


def segments(loaded: LoadedModel, name: str) -> torch.Tensor:
    """Return the beginning of an embedded text, (4, T)."""
    text = (embedded_folder("pico") / f"{name}.txt").read_text(encoding="utf-8")[:1500]
    return torch.tensor(loaded.tokenizer(text)["input_ids"])[: 4 * NUM_TOKENS].view(4, NUM_TOKENS)


@torch.no_grad()
def hidden(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states, (N, T, D)."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def test_every_choice_has_its_scheme() -> None:
    assert {path.stem for path in (Path(conf_dir()) / "preprocess").glob("*.yaml")} == {"none", *CHOICES}


@pytest.mark.parametrize("choice", CHOICES)
def test_integers_and_scales_change_and_the_error_is_smaller(first_blocks: LoadedModel, choice: str) -> None:
    """On a text that nothing was fitted to."""
    scheme, share = CHOICES[choice]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides=["model=pico_outliers", f"quant={scheme}", f"preprocess={choice}"])
    loaded = copy.deepcopy(first_blocks)
    model, tokens = loaded.model, segments(loaded, "test")
    expected = hidden(model, tokens)
    make_quantizable_(model, loaded.blocks, instantiate(config.runner.scheme))
    linears = quant_linears(loaded.blocks)
    nearest = [(linear.integers(), linear.weight_quantizer.scale.clone()) for linear in linears]
    with quant_state(model, QuantState.NEAREST):
        worst = (hidden(model, tokens) - expected).square().sum()
    instantiate(config.runner.preprocess).apply_(model, loaded.blocks, segments(loaded, "calibration"))
    torch.testing.assert_close(hidden(model, tokens), expected, rtol=1e-3, atol=1e-3)
    with quant_state(model, QuantState.LEARNED):
        error = (hidden(model, tokens) - expected).square().sum()
    pairs = list(zip(nearest, linears, strict=True))
    assert any(not torch.equal(integers, linear.integers()) for (integers, _), linear in pairs)
    assert any(not torch.equal(scale, linear.weight_quantizer.scale) for (_, scale), linear in pairs)
    assert error < share * worst

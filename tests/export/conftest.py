"""Finished models for exports: quantized, with something learned everywhere, and fused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cbq.export.targets import NoTarget, Target
from cbq.models.loading import LoadedModel, load_pretrained
from cbq.quant.linear import fuse_linears_, quant_linears
from cbq.quant.quantizer import act_quantizers
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules
from cbq.quantized import make_quantizable_


def finish_(model: torch.nn.Module, blocks: torch.nn.ModuleList, scheme: QuantScheme) -> None:
    """Quantize and fuse a model, with random offsets and step sizes in the place of learned ones."""
    make_quantizable_(model, blocks, scheme)
    torch.manual_seed(0)
    for module in quantized_modules(blocks):
        module.state = QuantState.LEARNED
    for linear in quant_linears(blocks):
        if linear.weight_quantizer is not None:
            linear.rounding = DenseSTE(linear.out_features, linear.in_features)
            torch.nn.init.normal_(linear.rounding.offset_values)
            torch.nn.init.uniform_(linear.weight_quantizer.step_size.multiplier, 0.9, 1.1)
    for quantizer in act_quantizers(blocks):
        if quantizer.has_multiplier:
            torch.nn.init.uniform_(quantizer.range_multiplier, 0.8, 1.0)
        quantizer.set_range_(torch.tensor(-2.0), torch.tensor(3.0))
    fuse_linears_(blocks)
    model.requires_grad_(False)


@pytest.fixture
def finished(tiny_llama_folder: Path) -> Callable[..., LoadedModel]:
    """Return a function that makes a finished tiny LLaMA of a scheme, for a target."""

    def make(scheme: QuantScheme, target: NoTarget | Target | None = None) -> LoadedModel:
        loaded = load_pretrained(str(tiny_llama_folder))
        finish_(loaded.model, loaded.blocks, (target or NoTarget()).constrain(scheme))
        return loaded

    return make

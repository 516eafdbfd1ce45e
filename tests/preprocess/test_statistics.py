"""Statistics in one pass against hooks on the plain Hugging Face forward."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cbq.models.families import get_blocks
from cbq.preprocess.statistics import input_statistics, set_act_ranges_
from cbq.quant.linear import quant_linears, quantize_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state


def test_ranges_equal_those_of_the_plain_forward(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    segments = torch.randint(320, (11, 24), generator=torch.Generator().manual_seed(0))
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    blocks = get_blocks(model)
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for module in blocks.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(segments)
    for hook in hooks:
        hook.remove()
    seen = 0
    for block, ranges in zip(blocks, input_statistics(model, blocks, segments, num_samples=40), strict=True):
        for name, found in ranges.items():
            x = inputs[block.get_submodule(name)]
            torch.testing.assert_close(found.low, x.amin((0, 1)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.high, x.amax((0, 1)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.maxima, x.abs().amax((0, 1)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.mean_magnitude, x.abs().mean((0, 1)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.sample, x.flatten(0, 1)[::7], rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen == 4 * 7
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_static_ranges_cover_the_calibration_data(tiny_llama_folder: Path) -> None:
    """Every linear's input, quantized by torch with the observed range, is what the quantizer makes of it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    segments = torch.randint(320, (5, 24), generator=torch.Generator().manual_seed(0))
    blocks = get_blocks(model)
    quantize_linears_(blocks, QuantScheme(16, 6, act_granularity="tensor"))
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    set_act_ranges_(model, blocks, segments)
    hooks = [
        linear.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for linear in quant_linears(blocks)
    ]
    model(segments)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == 28
    for linear, x in inputs.items():
        low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        scale = (high - low) / 63
        expected = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 63)
        off = (linear.act_quantizer.nearest(x) - expected).abs()
        assert (off > 1e-4 * scale).float().mean() < 1e-3, "but for ties"
        assert off.max() < 1.01 * scale
    with quant_state(model, QuantState.NEAREST):
        assert model(segments).logits.isfinite().all()

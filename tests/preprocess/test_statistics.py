"""Statistics in one pass against hooks on the plain Hugging Face forward."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cbq.models.families import get_blocks
from cbq.preprocess.statistics import input_maxima


def test_maxima_equal_those_of_the_plain_forward(tiny_llama_folder: Path) -> None:
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
    for block, maxima in zip(blocks, input_maxima(model, blocks, segments), strict=True):
        for name, largest in maxima.items():
            expected = inputs[block.get_submodule(name)].abs().amax((0, 1))
            torch.testing.assert_close(largest, expected, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == 4 * 7
    assert not any(module._forward_pre_hooks for module in model.modules())

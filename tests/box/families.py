"""Families on the box, whole and with their blocks in host memory: `python -m box.families FAMILY...`.

Each goes through preprocessing, both kinds of solvers and static activations, twice; prints where the two differ.
"""

import sys

from box import BOX, load_box

load_box()  # before anything asks torch which accelerators there are

# ruff: noqa: E402
import torch
from tiny_models import add_outliers_, tiny_model, token_ids
from torch import nn

import cbq.reconstruction.solver
from box.whole_run import window_trainer
from cbq.models.families import find_family, get_blocks
from cbq.models.linears import to_linears_
from cbq.models.offload import offload_
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.scaling import ActivationAware
from cbq.preprocess.statistics import expert_tokens, set_act_ranges_
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.scaling import LearnedScaling
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows

LOSS = ReconstructionLoss()
WAYS = {
    "W4A4, CFP, learned": (
        QuantScheme(4, 4),
        CoarseToFine(True, True),
        Reconstruction(LOSS, DenseSTE, LearningRates(), epochs=1, batch_size=3),
    ),
    "W2A16, CFP of weights, GPTQ": (QuantScheme(2, 16), CoarseToFine(True, False), GPTQ(LOSS)),
    "W4A8, AWQ, learned scaling": (
        QuantScheme(4, 8),
        ActivationAware(grid=3),
        Reconstruction(LOSS, DenseSTE, LearningRates(), scaling=LearnedScaling(), epochs=1, batch_size=3),
    ),
    "W8A8, static activations": (
        QuantScheme(8, 8, act_granularity="tensor"),
        CoarseToFine(False, True),
        Reconstruction(LOSS, DenseSTE, LearningRates(), epochs=1, batch_size=3),
    ),
}


def quantized(name: str, way: str, offload: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the state and the losses of a quantized family; blocks are seen to be where they should."""
    scheme, preprocess, solver = WAYS[way]
    model, tokens = tiny_model(name), token_ids()
    to_linears_(model)
    add_outliers_(model, 8)
    blocks = get_blocks(model)
    make_quantizable_(model, blocks, scheme)
    if offload:
        offload_(model, blocks, BOX)
        # These show a block's call for a number of segments that is new, of which a window holds two, to the model.
        watch(blocks, limit=3 if find_family(model.config).calls_by_batch else 2)
    else:
        model.to(BOX)
    expert_tokens(model, blocks, tokens)
    preprocess.apply_(model, blocks, tokens)
    set_act_ranges_(model, blocks, tokens)
    plan = SlidingWindows(2, 1).plan(len(blocks))
    results = reconstruct_(model, blocks, tokens, plan, solver, [], lambda result: None)
    if offload:
        assert not resident(blocks), "blocks left on the device"
    logits = model(input_ids=tokens[:2].to(BOX), use_cache=False).logits
    assert logits.isfinite().all()
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items()} | {"logits": logits.cpu()}
    return state, [loss for result in results for loss in (result.rec_loss_first, result.rec_loss_last)]


def resident(blocks: nn.ModuleList) -> list[int]:
    """Return which blocks have anything on the box."""
    return [
        index
        for index, block in enumerate(blocks)
        if any(tensor.device == BOX for tensor in (*block.parameters(), *block.buffers()))
    ]


def watch(blocks: nn.ModuleList, limit: int) -> None:
    """See to it that a block is on the box whenever it computes, and no more than `limit` are."""

    def check(index: int) -> None:
        there = resident(blocks)
        assert index in there, f"block {index} computes in host memory"
        assert len(there) <= limit, f"blocks {there} are on the device"

    for index, block in enumerate(blocks):
        for child in block.children():
            child.register_forward_pre_hook(lambda module, args, index=index: check(index))


def main(names: list[str]) -> None:
    """Compare."""
    cbq.reconstruction.solver.window_trainer = window_trainer
    for name in names:
        for way in WAYS:
            torch.manual_seed(0)
            state, losses = quantized(name, way, offload=True)
            torch.manual_seed(0)
            expected, expected_losses = quantized(name, way, offload=False)
            same = losses == expected_losses and state.keys() == expected.keys()
            same = same and all(torch.equal(state[key], expected[key]) for key in state)
            print(f"{name}, {way}: {'equal' if same else 'DIFFERENT'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

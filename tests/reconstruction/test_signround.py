"""`method=signround` against SignRound written out on a plain transformers block."""

import copy

import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from cbq.cli import conf_dir
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.windows import SlidingWindows

STEPS, RATE = 6, 5e-3
Value = torch.Tensor | float


class RoundAsIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def quantized(x: torch.Tensor, bits: int, v: Value = 0.0, alpha: Value = 1.0, beta: Value = 1.0) -> torch.Tensor:
    """Cheng et al. (2023), Eq. 2 to 4: the scale is (max(W) alpha - min(W) beta) / (2^b - 1).

    Of inputs likewise, token by token, with nothing to learn: all of it passes a gradient on.
    """
    high, low = x.amax(-1, keepdim=True).clamp(min=0) * alpha, x.amin(-1, keepdim=True).clamp(max=0) * beta
    scale = (high - low) / (2**bits - 1)
    zero_point = RoundAsIdentity.apply(-low / scale)
    integers = (RoundAsIdentity.apply(x / scale + v) + zero_point).clamp(0, 2**bits - 1)
    return scale * (integers - zero_point)


class Batches(L.Callback):
    """The inputs of every step."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        self.inputs.append(batch[0].clone())


@pytest.mark.parametrize(("bits", "act_bits"), [(2, 16), (4, 4)])
def test_a_block_is_learned_as_written_out(bits, act_bits, make_setup, tiny_llama):
    """Same batches in the same order: the same offsets and clipping factors, and the same best step."""
    overrides = ["method=signround", "reconstruction.num_steps=6", "reconstruction.batch_size=4"]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        solver = instantiate(hydra.compose("config", overrides=overrides).reconstruction)
    setup = make_setup(QuantScheme(bits, act_bits))
    batches = Batches()
    solver.solve(SlidingWindows(1).plan(4)[0], setup.cache, [batches])

    block, call = copy.deepcopy(tiny_llama.model.layers[0]), setup.cache.calls_of(1)[0]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    learned = {
        name: [torch.zeros_like(linear.weight), *(torch.ones(linear.out_features, 1) for _ in range(2))]
        for name, linear in linears.items()
    }
    exact = copy.deepcopy(block)
    if act_bits < 16:
        for linear in linears.values():
            linear.register_forward_pre_hook(lambda module, args: quantized(args[0], act_bits))
    smallest, best = float("inf"), None
    for step, inputs in enumerate(batches.inputs):
        parameters = [tensor.requires_grad_() for tensors in learned.values() for tensor in tensors]
        weights = {
            f"{name}.weight": quantized(linear.weight, bits, v.clamp(-0.5, 0.5), alpha, beta)
            for (name, linear), (v, alpha, beta) in zip(linears.items(), learned.values(), strict=True)
        }
        output = torch.func.functional_call(block, weights, (inputs, *call.args), call.kwargs)
        loss = ((output - exact(inputs, *call.args, **call.kwargs)) ** 2).mean()
        if loss.item() < smallest:
            smallest = loss.item()
            best = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in learned.items()}
        gradients = iter(torch.autograd.grad(loss, parameters))
        rate = RATE * (1 - step / STEPS)
        learned = {
            name: [(tensor - rate * next(gradients).sign()).detach() for tensor in tensors]
            for name, tensors in learned.items()
        }
        for _, *factors in learned.values():
            for factor in factors:
                factor.clamp_(0, 1)  # the released code brings them back after each step
    for name, (v, alpha, beta) in best.items():
        linear = setup.blocks[0].get_submodule(name)
        step_size = linear.weight_quantizer.step_size
        mine = (linear.rounding.offset_values, step_size.upper.view_as(alpha), step_size.lower.view_as(beta))
        for ours, theirs in zip(mine, (v, alpha, beta), strict=True):
            assert (ours - theirs).abs().gt(1e-6).float().mean() < 0.02, "signs of gradients near 0 may differ"
        assert v.abs().max() > RATE
    assert len(batches.inputs) == STEPS
    assert len(best) == len(quant_linears(setup.blocks[0])) == 7

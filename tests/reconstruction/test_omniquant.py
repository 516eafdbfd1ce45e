"""`method=omniquant` against OmniQuant written out on a plain transformers block."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F

from cbq.cli import conf_dir
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.windows import SlidingWindows

CLIPPING_RATE, SCALE_RATE, START = 1e-2, 5e-3, 4.0
VALUES = "self_attn.v_proj"
PAIRS = {  # what is divided by the scales, and what is multiplied
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", VALUES),
    VALUES: ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def round_straight_through(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def quantized(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Shao et al. (2023), Eq. 2 for given ends; a gradient passes the rounding of x, not that of the zero point."""
    step = (high - low) / (2**bits - 1)
    zero_point = (-low / step).detach().round()
    return step * ((round_straight_through(x / step) + zero_point).clamp(0, 2**bits - 1) - zero_point)


def clipped(weight: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = weight.amin(1, keepdim=True) * lower.sigmoid(), weight.amax(1, keepdim=True) * upper.sigmoid()
    return quantized(weight, low, high, bits)


def each_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Every token in its own range, through which a gradient passes too."""
    return quantized(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)


class PlainOmniQuant:
    """A block of transformers, its weights a function of clipping logits and of logarithms of channel scales.

    Args:
        block: in full precision.
        weight_bits: of its linears.
        act_bits: of their inputs; at 16 there are no scales.
        inputs: of the block, all segments; the scales start from them.
        call: what the model passes to the block besides them, by their number.
    """

    def __init__(self, block, weight_bits: int, act_bits: int, inputs: torch.Tensor, call: Callable) -> None:
        self.block, self.call, self.weight_bits = block, call, weight_bits
        self.linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        self.logits = {
            name: [torch.full((linear.out_features, 1), START) for _ in range(2)]
            for name, linear in self.linears.items()
        }
        self.quantize_input = partial(each_token, bits=act_bits) if act_bits < 16 else nn.Identity()
        self.logarithms = {name: scale.log() for name, scale in self.smoothquant(inputs)} if act_bits < 16 else {}

    def run(self, weights: dict[str, torch.Tensor], inputs: torch.Tensor, hook: Callable) -> torch.Tensor:
        """Return the block's output with other weights; `hook` may change what a linear of a name reads."""
        hooks = [
            linear.register_forward_pre_hook(lambda module, args, name=name: hook(name, args[0]))
            for name, linear in self.linears.items()
        ]
        call = self.call(len(inputs))
        try:
            return torch.func.functional_call(self.block, weights, (inputs, *call.args), call.kwargs)
        finally:
            for handle in hooks:
                handle.remove()

    def full_precision(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.run({}, inputs, lambda name, x: None)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weights = self.weights()
        for name, bounds in self.logits.items():
            weights[f"{name}.weight"] = clipped(weights[f"{name}.weight"], *bounds, self.weight_bits)
        return self.run(weights, inputs, lambda name, x: self.quantize_input(x))

    def smoothquant(self, inputs: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield max|X|^0.5 / max|W|^0.5 of each channel of every producer."""
        read = {}
        with torch.no_grad():
            self.run({}, inputs, lambda name, x: read.update({name: x}))
        for producer, consumers in PAIRS.items():
            values = read[consumers[0]].abs().flatten(0, 1).amax(0)
            columns = torch.cat([self.linears[name].weight for name in consumers]).abs().amax(0)
            if producer == VALUES:
                values, columns = (self.by_head(features).amax(1).flatten() for features in (values, columns))
            yield producer, (values / columns).sqrt()

    def by_head(self, features: torch.Tensor) -> torch.Tensor:
        """Return what `o_proj` reads by head of values, head of queries that shares it, and channel."""
        attention = self.block.self_attn
        return features.view(-1, attention.num_key_value_groups, attention.head_dim)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all weights by name, with the scales in them."""
        weights = dict(self.block.named_parameters())
        for producer, logarithm in self.logarithms.items():
            rows = columns = logarithm.exp()
            if producer == VALUES:
                columns = torch.empty(self.linears["self_attn.o_proj"].in_features)
                columns = rows.view(-1, 1, self.block.self_attn.head_dim).expand_as(self.by_head(columns)).flatten()
            weight = weights[f"{producer}.weight"]
            weights[f"{producer}.weight"] = weight / rows.view(-1, *[1] * (weight.dim() - 1))
            for name in PAIRS[producer]:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * columns
        return weights

    def learn(self, batches: list[tuple[torch.Tensor, torch.Tensor]], homologous_weight: float) -> None:
        """Take a step for each input and its target."""
        groups = {CLIPPING_RATE: list(chain(*self.logits.values())), SCALE_RATE: list(self.logarithms.values())}
        groups = [{"params": tensors, "lr": rate} for rate, tensors in groups.items() if tensors]
        for tensor in chain(*(group["params"] for group in groups)):
            tensor.requires_grad_()
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for inputs, target in batches:
            output = self(inputs)
            loss = F.mse_loss(output, target)
            if homologous_weight:
                loss = loss + homologous_weight * F.mse_loss(output, self.full_precision(inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Order(L.Callback):
    """Which segment each step learns from."""

    def __init__(self) -> None:
        self.segments: list[int] = []

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        same = (module.cache.quantized[:] == batch[0]).flatten(1).all(1)
        self.segments.append(same.nonzero().item())


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "index", "homologous_weight", "steps"),
    [(2, 16, 0, 0.0, 8), (2, 16, 1, 1.0, 8), (4, 4, 1, 0.0, 4)],  # in more a last bit may round an input the other way
    ids=["clipping", "clipping, two targets", "clipping and scales"],
)
def test_a_block_is_learned_as_written_out(
    make_setup, tiny_llama, weight_bits, act_bits, index, homologous_weight, steps
):
    """Same batches in the same order: the same clipping, the same scales, the same loss and output."""
    overrides = ["method=omniquant", "reconstruction.epochs=null", f"reconstruction.num_steps={steps}"]
    overrides += [f"reconstruction.homologous_weight={homologous_weight}"]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        solver = instantiate(hydra.compose("config", overrides=overrides).reconstruction)
    setup, order = make_setup(QuantScheme(weight_bits, act_bits)), Order()
    setup.solve(solver, SlidingWindows(1), [], num_windows=index)
    result = solver.solve(SlidingWindows(1).plan(4)[index], setup.cache, [order])
    assert result.guard is None
    assert len(set(order.segments)) == steps

    with torch.no_grad():
        targets = tiny_llama(setup.segments, output_hidden_states=True).hidden_states[index + 1]
    inputs, block = setup.cache.quantized[:], copy.deepcopy(tiny_llama.model.layers[index])
    plain = PlainOmniQuant(block, weight_bits, act_bits, inputs, lambda size: setup.cache.calls_of(size)[index])
    start = {name: weight.detach() for name, weight in plain.weights().items()}
    plain.learn([(inputs[[number]], targets[[number]]) for number in order.segments], homologous_weight)

    solved = setup.blocks[index]
    assert len(plain.logits) == len(quant_linears(solved)) == 7
    for name, bounds in plain.logits.items():
        step_size = solved.get_submodule(name).weight_quantizer.step_size
        for ours, theirs in zip((step_size.lower, step_size.upper), bounds, strict=True):
            torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=0, atol=1e-5)
            assert (theirs - START).abs().max() > 0.6 * steps * CLIPPING_RATE
    for name, weight in plain.weights().items():  # the scales are in them
        torch.testing.assert_close(solved.get_parameter(name), weight, rtol=1e-5, atol=1e-6)
        assert (act_bits < 16) == bool((weight / start[name] - 1).abs().max() > 0.6 * steps * SCALE_RATE)
    with torch.no_grad():
        output, expected = setup.cache.run_blocks(index, index + 1, inputs), plain(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert result.rec_loss_last == pytest.approx(F.mse_loss(expected, targets).item(), rel=1e-5)

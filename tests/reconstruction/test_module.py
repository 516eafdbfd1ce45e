"""What a window learns, and the loss that it learns from."""

import numpy as np
import pytest
import torch

from cbq.quant.linear import quant_linears
from cbq.quant.rounding import AdaRound, DenseSTE, LoRASTE, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates, WindowModule
from cbq.reconstruction.windows import SlidingWindows, Window

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


WINDOW = Window(1, 3, 1, 2)
RATES = LearningRates()


def make_module(setup, kind=DenseSTE, window=WINDOW, rates=RATES, compensation_weight=1.0, **options) -> WindowModule:
    """A window over blocks 1 and 2 whose linears are in the learned state."""
    for linear in quant_linears(list(setup.blocks[window.start : window.stop])):
        linear.state = QuantState.LEARNED
        if linear.weight_quantizer is not None and kind is not Nearest:
            linear.rounding = kind(linear.out_features, linear.in_features, learning_rate=0.01)
    return WindowModule(window, setup.cache, ReconstructionLoss(), compensation_weight, rates, **options)


def learned_names(setup, module: WindowModule) -> set[str]:
    """The names in the model of what the module learns."""
    learned = {id(parameter) for parameter in module.parameters()}
    names = {name for name, parameter in setup.model.named_parameters() if id(parameter) in learned}
    assert len(names) == len(learned), "nothing but the model's own parameters"
    return names


def expected_names(blocks: list[int], parts: list[str]) -> set[str]:
    return {f"model.layers.{block}.{linear}.{part}" for block in blocks for linear in LINEARS for part in parts}


S_W, S_X, OFFSET = "weight_quantizer.step_size.multiplier", "act_quantizer.range_multiplier", "rounding.offset_values"


@pytest.mark.parametrize(
    ("scheme", "kind", "rates", "parts"),
    [
        (QuantScheme(4, 4), DenseSTE, (1, 1), [S_W, S_X, OFFSET]),
        (QuantScheme(4, 4), LoRASTE, (1, 1), [S_W, S_X, "rounding.a1", "rounding.a2"]),
        (QuantScheme(4, 4), Nearest, (1, 1), [S_W, S_X]),
        (QuantScheme(2, 16), AdaRound, (1, 1), [S_W, "rounding.logits"]),
        (QuantScheme(16, 8), DenseSTE, (1, 1), [S_X]),
        (QuantScheme(4, 4), DenseSTE, (0, 1), [S_X, OFFSET]),
        (QuantScheme(4, 4), DenseSTE, (1, 0), [S_W, OFFSET]),
        (QuantScheme(4, 4), Nearest, (0, 0), []),
        (QuantScheme(16, 16), DenseSTE, (1, 1), []),
    ],
)
def test_parameters_are_the_declared_ones(make_setup, scheme, kind, rates, parts):
    setup = make_setup(scheme)
    module = make_module(setup, kind, rates=LearningRates(*rates))
    assert learned_names(setup, module) == expected_names([1, 2], parts)


def test_rounding_of_the_overlap_only(make_setup):
    setup = make_setup(QuantScheme(4, 4))
    (_, window, _) = SlidingWindows(2, 1, "overlap").plan(4)
    module = make_module(setup, window=window)
    assert learned_names(setup, module) == expected_names([1, 2], [S_W, S_X]) | expected_names([2], [OFFSET])


def test_groups_have_their_rates(make_setup):
    module = make_module(make_setup(QuantScheme(4, 4)), rates=LearningRates(2e-3, 3e-4))
    assert {name: group["lr"] for name, group in module.groups.items()} == {
        "weight_scale": 2e-3,
        "act_scale": 3e-4,
        "rounding": 0.01,
    }


def test_forward_is_the_windows_blocks(make_setup, tiny_llama, segments):
    """In full precision, that of the plain model."""
    setup = make_setup(QuantScheme(4, 4))
    module = make_module(setup)
    for linear in quant_linears(setup.model):
        linear.state = QuantState.FULL_PRECISION
    states = tiny_llama(segments, output_hidden_states=True).hidden_states
    torch.testing.assert_close(module(states[1]), states[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [None, 2.0, 20.0])
def test_total_loss(make_setup, beta):
    """Eq. 13, at the start, where the soft values are the fractions of the weights in units of their scales."""
    setup = make_setup(QuantScheme(2, 16))
    module = make_module(setup, AdaRound, compensation_weight=3.0)
    module.learned.requires_grad_(True)
    module.beta = beta
    hidden = setup.cache.quantized[:2]
    target = torch.randn_like(hidden)
    total = module.training_step([hidden, target], 0)

    output = module(hidden)
    distances = (output - target).norm(dim=-1).mean().item()
    divergences = torch.nn.KLDivLoss(reduction="none")(output.log_softmax(-1), target.softmax(-1)).sum(-1).mean().item()
    means = []
    for linear in quant_linears(list(module.blocks)):
        steps = (linear.weight / linear.weight_quantizer.initial_scale.squeeze(-1)).numpy().astype(np.float64)
        means.append(0.0 if beta is None else (1 - np.abs(2 * (steps - np.floor(steps)) - 1) ** beta).mean())
    assert len(means) == 14
    expected = {
        "loss/l2": distances,
        "loss/kld": divergences,
        "loss/rec": distances + divergences,
        "loss/com": np.mean(means),
        "loss/total": distances + divergences + 3 * np.mean(means),
    }
    assert {name: value.item() for name, value in module.losses.items()} == pytest.approx(expected, rel=1e-4)
    assert total.item() == pytest.approx(expected["loss/total"], rel=1e-4)
    assert total.requires_grad
    assert not any(value.requires_grad for value in module.losses.values())


def test_losses_are_means_over_the_batches_of_a_step(make_setup):
    setup = make_setup(QuantScheme(4, 4))
    batches = [[setup.cache.quantized[i : i + 1], torch.randn(1, 32, 64)] for i in range(5)]
    alone, module = make_module(setup), make_module(setup, accumulate_grad_batches=3)
    singles, means = [], []
    for index, batch in enumerate(batches):
        alone.training_step(batch, index)
        singles.append({name: loss.item() for name, loss in alone.losses.items()})
        module.training_step(batch, index)
        means.append({name: loss.item() for name, loss in module.losses.items()})
    for index, among in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (3, [3]), (4, [3, 4])):
        expected = {name: np.mean([singles[i][name] for i in among]) for name in singles[0]}
        assert means[index] == pytest.approx(expected, rel=1e-5)


def test_homologous_term(make_setup):
    """The second target enters with its weight, under its own names."""
    setup = make_setup(QuantScheme(4, 4))
    hidden = setup.cache.quantized[:2]
    first, second = torch.randn_like(hidden), torch.randn_like(hidden)
    module = make_module(setup, homologous_weight=0.5)
    losses = {}
    for name, batch in {"first": [hidden, first], "second": [hidden, second], "both": [hidden, first, second]}.items():
        module.training_step(batch, 0)
        losses[name] = {key: value.item() for key, value in module.losses.items()}
    both = losses["both"]
    assert both["loss/rec"] == pytest.approx(losses["first"]["loss/rec"] + 0.5 * losses["second"]["loss/rec"])
    for term in ("l2", "kld"):
        assert both[f"loss/{term}"] == pytest.approx(losses["first"][f"loss/{term}"])
        assert both[f"loss/homologous_{term}"] == pytest.approx(losses["second"][f"loss/{term}"])
    assert not any("homologous" in key for key in losses["first"])

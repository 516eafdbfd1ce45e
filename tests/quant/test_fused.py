"""One pass with gradients by hand, against plain autograd through the definition of each rounding."""

import itertools
import logging
from collections.abc import Callable

import pytest
import torch

from cbq.errors import InputError
from cbq.quant import kernels as kernels_module
from cbq.quant.affine import dequantize_affine, fake_quantize_affine, to_groups
from cbq.quant.fused import fake_quantize
from cbq.quant.kernels import Blocked, Compiled, Kernels, check_compile, choose_kernels, run_by
from cbq.quant.quantizer import ActQuantizer, StaticActQuantizer, WeightQuantizer
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding, LoRASTE, Nearest, Rounding

SHAPE = (13, 32)  # a row of whole vectors: the last numbers of others go through another exp and pow
SCHEMES = [(2, -1, False), (4, 8, False), (3, 16, True), (8, -1, True)]  # bits, group size, symmetric


class FarDenseSTE(DenseSTE):
    """Offsets of up to one and a half steps."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features, limit=1.5)


# kind, hard, beta
KINDS = [
    (Nearest, False, None),
    (DenseSTE, False, None),
    (LoRASTE, False, None),
    (FarDenseSTE, False, None),
    *[(kind, hard, beta) for kind in (AdaRound, LoRARounding) for hard, beta in ((False, None), (True, None))],
    *[(kind, False, beta) for kind in (AdaRound, LoRARounding) for beta in (2.0, 7.3)],
]
CASES = list(itertools.product(KINDS, SCHEMES))
IDS = [f"{k.__name__} hard={hard} beta={beta} W{s[0]}g{s[1]}" for (k, hard, beta), s in CASES]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 rows at a time of `SHAPE`: the last chunk is shorter."""
    monkeypatch.setattr(kernels_module, "CPU_CHUNK", 5 * SHAPE[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def make(kind: tuple, scheme: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    """A weight, its quantizer, a rounding away from its start, and the gradient of the output."""
    (kind, hard, beta), generator = kind, torch.Generator().manual_seed(4)
    weight = torch.randn(SHAPE, generator=generator)
    quantizer, rounding = WeightQuantizer(weight, *scheme), kind(*SHAPE)
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        quantizer.step_size.multiplier.uniform_(0.5, 1.3, generator=generator)  # below 1 clips
        quantizer.step_size.multiplier[0] = -1.0  # held at the smallest
    if hard:
        rounding.harden_()
    else:
        rounding.beta = beta
    gradient = torch.randn(SHAPE, generator=generator)
    return weight.to(dtype), quantizer.to(dtype), rounding.to(dtype), gradient.to(dtype)


def plain(weight: torch.Tensor, quantizer: WeightQuantizer, rounding: Rounding) -> torch.Tensor:
    """The definition, by plain autograd."""
    scale, groups = quantizer.scale, to_groups(weight, quantizer.group_size)
    values = rounding(groups, quantizer.initial_scale, scale) + quantizer.zero_point
    return dequantize_affine(
        values.clamp(quantizer.quant_min, quantizer.quant_max), scale, quantizer.zero_point
    ).flatten(1)


def outcome(output: torch.Tensor, gradient: torch.Tensor, quantizer: WeightQuantizer, rounding: Rounding) -> list:
    """Output, penalty if any, and the gradient of everything learned."""
    penalty = rounding.penalty()
    total = (output * gradient).sum()
    (total if penalty is None else total + 3 * penalty).backward()
    learned = [quantizer.step_size.multiplier, *rounding.parameters()]
    gradients = [parameter.grad.clone() for parameter in learned]
    for parameter in learned:
        parameter.grad = None
    return [output.detach(), *([] if penalty is None else [penalty.detach()]), *gradients]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "scheme"), CASES, ids=IDS)
def test_equals_plain_autograd_in_float64(kind, scheme):
    weight, quantizer, rounding, gradient = make(kind, scheme, torch.float64)
    expected = outcome(plain(weight, quantizer, rounding), gradient, quantizer, rounding)
    actual = outcome(quantizer(weight, rounding), gradient, quantizer, rounding)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    scale_gradient = expected[1 if kind[2] is None else 2]
    assert (scale_gradient[0] == 0).all(), "nothing moves a multiplier that is held"
    assert (scale_gradient[1:] != 0).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "scheme"), CASES, ids=IDS)
def test_equals_plain_autograd_to_the_bit(kind, scheme, monkeypatch):
    """In float32; but the penalty itself, whose sum is taken by chunks. Low-rank logits in one chunk, for a product of
    fewer rows has other last bits on some processors."""
    if kind[0] is LoRARounding:
        monkeypatch.setattr(kernels_module, "CPU_CHUNK", SHAPE[0] * SHAPE[1])
    weight, quantizer, rounding, gradient = make(kind, scheme)
    expected = outcome(plain(weight, quantizer, rounding), gradient, quantizer, rounding)
    actual = outcome(quantizer(weight, rounding), gradient, quantizer, rounding)
    if kind[2] is not None:
        torch.testing.assert_close(actual.pop(1), expected.pop(1), rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("beta", [None, 3.5])
@pytest.mark.parametrize("kind", [AdaRound, LoRARounding])
def test_soft_gradient_equals_finite_differences(kind, beta):
    """What has no jumps, against torch's own check."""
    weight, quantizer, rounding, _ = make((kind, False, beta), (4, 8, False), torch.float64)

    def function(multiplier, *parameters):
        scale = quantizer.initial_scale * multiplier
        grid = scale, quantizer.initial_scale, quantizer.zero_point, (quantizer.quant_min, quantizer.quant_max)
        values, penalty = fake_quantize(Blocked(), rounding.fusion(), weight, *grid, parameters)
        return values if penalty is None else (values, penalty)

    inputs = [quantizer.step_size.multiplier.detach().abs().requires_grad_()]
    inputs += [parameter.detach().clone().requires_grad_() for parameter in rounding.parameters()]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__} hard={kind[1]} beta={kind[2]}")
def test_keeps_nothing_of_a_weights_size_for_the_backward(kind):
    weight, quantizer, rounding, _ = make(kind, (4, 8, False))
    shared = {tensor.untyped_storage().data_ptr() for tensor in (weight, *rounding.parameters())}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantizer(weight, rounding)
    own = [t for t in kept if t.untyped_storage().data_ptr() not in shared]
    assert kept
    assert max(t.numel() for t in own) < weight.numel() / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    """The chain is computed in float32 from the weight that there is, and cast at the end."""
    weight, quantizer, rounding, gradient = make((DenseSTE, False, None), (4, 8, False))
    weight, gradient = weight.to(dtype), gradient.to(dtype)
    expected = plain(weight.float(), quantizer, rounding).to(dtype)
    actual = quantizer(weight, rounding)
    assert torch.equal(actual, expected)
    for a, b in zip(
        outcome(actual, gradient, quantizer, rounding), outcome(expected, gradient, quantizer, rounding), strict=True
    ):
        assert torch.equal(a, b)


def test_a_weight_that_is_learned_itself_takes_plain_autograd():
    weight, quantizer, rounding, gradient = make((LoRASTE, False, None), (4, 8, False))
    weight.requires_grad_()
    (quantizer(weight, rounding) * gradient).sum().backward()
    actual, weight.grad = weight.grad, None
    (plain(weight, quantizer, rounding) * gradient).sum().backward()
    assert torch.equal(actual, weight.grad)
    assert (actual != 0).any()


def test_a_kind_without_a_formula_takes_plain_autograd():
    class Twice(Rounding):
        """Someone's own."""

        def __init__(self) -> None:
            super().__init__(0.1)
            self.offset = torch.nn.Parameter(torch.full((), 0.2))

        def forward(self, groups, initial_scale, scale):
            return groups / scale + self.offset

    weight, quantizer, _, gradient = make((Nearest, False, None), (4, 8, False))
    rounding = Twice()
    (quantizer(weight, rounding) * gradient).sum().backward()
    assert rounding.offset.grad != 0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", [ActQuantizer, StaticActQuantizer])
def test_activations_equal_plain_autograd_to_the_bit(kind, symmetric, needs_input):
    generator = torch.Generator().manual_seed(5)
    x, gradient = (torch.randn(2, 7, SHAPE[1], generator=generator) for _ in range(2))
    x.requires_grad_(needs_input)
    quantizer = kind(4, symmetric)
    if kind is StaticActQuantizer:
        quantizer.set_range_(torch.tensor(-2.0), torch.tensor(2.0))
    with torch.no_grad():
        quantizer.range_multiplier.fill_(0.6)
    learned = [quantizer.range_multiplier, *([x] if needs_input else [])]
    outcomes = []
    for by_hand in (False, True):
        if by_hand:
            output = quantizer(x)
        else:
            scale, zero_point = quantizer.qparams(x.detach())
            scale = scale * quantizer.range_multiplier.clamp_min(0.05)
            output = fake_quantize_affine(x, scale, zero_point, 0, 15)
        gradients = torch.autograd.grad((output * gradient).sum(), learned)
        outcomes.append([output, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert (outcomes[0][1] != 0).any()


class Counting(Blocked):
    """Counts what runs through it."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, *arguments):
        self.calls += 1
        return super().forward(*arguments)


def test_run_by_is_undone():
    weight, quantizer, rounding, _ = make((DenseSTE, False, None), (4, 8, False))
    before, counting = quantizer.kernels, Counting()
    with run_by([quantizer], counting):
        quantizer(weight, rounding)
    quantizer(weight, rounding)
    assert quantizer.kernels is before
    assert counting.calls == 1


def all_outcomes(kernels: Kernels, cases: list) -> list[list[torch.Tensor]]:
    """What some kernels make of all cases."""
    outcomes = []
    for kind, scheme in cases:
        weight, quantizer, rounding, gradient = make(kind, scheme)
        with run_by([quantizer], kernels):
            outcomes.append(outcome(quantizer(weight, rounding), gradient, quantizer, rounding))
    quantizer, x = ActQuantizer(4), torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with run_by([quantizer], kernels):
        output = quantizer(x)
        output.square().sum().backward()
    return [*outcomes, [output.detach(), x.grad, quantizer.range_multiplier.grad]]


def assert_close(actual: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for a, b in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_compiled_is_the_same_computation(monkeypatch):
    """With a compiler that leaves everything as it is."""
    compiled: list[Callable] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    assert_close(all_outcomes(Compiled(), CASES), all_outcomes(Blocked(), CASES))
    assert len(compiled) == 2 * 9, "each kind once each way: 4 straight-through, 2 soft, 2 hard, and inputs as nearest"


def test_a_compiler_that_fails_is_left_alone(monkeypatch, caplog):
    attempts = []

    def broken(function, **options):
        attempts.append(function)

        def call(*arguments):
            raise RuntimeError("no g++\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        actual = all_outcomes(Compiled(), CASES[:4])
    assert len(attempts) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here, going on without: RuntimeError: no g++"
    ]
    for a, b in zip(itertools.chain(*actual), itertools.chain(*all_outcomes(Blocked(), CASES[:4])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled():
    """By the real compiler, where there is one."""
    kernels = Compiled()
    assert_close(all_outcomes(kernels, CASES), all_outcomes(Blocked(), CASES))
    if not kernels.works:
        pytest.skip("no working compiler")


@pytest.mark.parametrize(
    ("value", "device", "num_weights", "num_steps", "expected"),
    [
        ("auto", "cpu", 10**8, 1, Blocked),
        ("auto", "cpu", 10**8, 10**4, Compiled),
        ("auto", "cpu", 10**6, 10**6, Blocked),
        ("auto", "cuda", 1, 1, Compiled),
        (True, "cpu", 1, 1, Compiled),
        (False, "cuda", 10**8, 10**4, Blocked),
    ],
)
def test_choice_of_kernels(value, device, num_weights, num_steps, expected):
    assert type(choose_kernels(value, torch.device(device), num_weights, num_steps)) is expected


@pytest.mark.parametrize("value", ["on", "true", 1, 0, None, [True]], ids=repr)
def test_compile_is_a_flag_or_auto(value):
    with pytest.raises(InputError, match=r"reconstruction\.compile must be auto, true or false"):
        check_compile(value)

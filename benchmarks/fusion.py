"""Weight fake-quantization, forward and backward, of every rounding kind: as installed against the plain chain.

Where the installed code is the plain chain, the ratio is about 1; what fusing gains is what it falls below 1.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks import reference
from benchmarks.clock import interleave, now, ratios
from benchmarks.plan import Plan
from benchmarks.rows import Row
from benchmarks.shapes import ROUNDINGS, Size
from cbq.quant.quantizer import WeightQuantizer

BITS = 4
BETA = 10.0
SOFTENED = {"lora", "adaround"}  # these are measured before and after hardening: different passes
Outputs = tuple[torch.Tensor, torch.Tensor | None]


def measure(plan: Plan) -> Iterator[Row]:
    """Yield two rows a rounding kind and size."""
    for size in plan.sizes:
        for kind in ROUNDINGS:
            for hard in (False, True) if kind in SOFTENED else (False,):
                yield from measure_kind(size, kind, hard, plan)


def measure_kind(size: Size, kind: str, hard: bool, plan: Plan) -> Iterator[Row]:
    """Yield the rows of one kind, on the largest weight of a block, (intermediate, hidden)."""
    installed, chain, learned = make_pair(size.intermediate, size.hidden, kind, hard, plan.device)
    gradient = torch.randn(size.intermediate, size.hidden, device=plan.device)
    actions = [pass_seconds(form, learned, gradient, plan.shortest_seconds) for form in (installed, chain)]
    samples = interleave(actions, plan.repeats)
    case = f"{size.name} {size.intermediate}x{size.hidden} W{BITS} {kind}{' hard' if hard else ''}"
    for index, direction in enumerate(("forward", "backward")):
        above, below = ([sample[index] for sample in taken] for taken in samples)
        yield Row("fusion", f"fake-quantize {direction}: installed / plain chain", case, ratios(above, below))


def make_pair(
    out_features: int, in_features: int, kind: str, hard: bool, device: torch.device
) -> tuple[Callable[[], Outputs], Callable[[], Outputs], list[torch.nn.Parameter]]:
    """Return the installed form and the plain chain on the same tensors, and what they learn.

    Either returns the fake-quantized weight and the compensation loss, as a window step computes them.
    """
    torch.manual_seed(0)
    weight = (torch.randn(out_features, in_features) * 0.02).to(device)
    quantizer = WeightQuantizer(weight, BITS).to(device)
    rounding = ROUNDINGS[kind](out_features, in_features).to(device)
    for parameter in rounding.parameters():  # not at its start, where some gradients are 0
        torch.nn.init.normal_(parameter, std=0.2)
    if hard:
        rounding.harden_()

    def installed() -> Outputs:
        rounding.beta = BETA if not hard else None
        return quantizer(weight, rounding), rounding.penalty()

    def chain() -> Outputs:
        return reference.fake_quantize(kind, quantizer, weight, rounding, BETA)

    return installed, chain, [quantizer.step_size.multiplier, *rounding.parameters()]


def pass_seconds(
    form: Callable[[], Outputs], learned: list[torch.nn.Parameter], gradient: torch.Tensor, shortest: float
) -> Callable[[], tuple[float, float]]:
    """Return an action that measures seconds a forward and a backward pass, over at least `shortest` seconds."""

    def action() -> tuple[float, float]:
        forward = backward = 0.0
        calls = 0
        while calls == 0 or forward + backward < shortest:
            began = now(gradient.device)
            quantized, penalty = form()
            middle = now(gradient.device)
            if penalty is None:
                quantized.backward(gradient)
            else:
                torch.autograd.backward([quantized, penalty], [gradient, torch.ones_like(penalty)])
            ended = now(gradient.device)
            for parameter in learned:
                parameter.grad = None
            forward, backward, calls = forward + middle - began, backward + ended - middle, calls + 1
        return forward / calls, backward / calls

    return action

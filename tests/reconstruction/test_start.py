"""Windows that start where GPTQ ends."""

import pytest
import torch

from cbq.errors import InputError
from cbq.quant.linear import quant_linears
from cbq.quant.rounding import AdaRound, DenseSTE, LoRASTE
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.none import NoReconstruction
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows

LOSS = ReconstructionLoss()
STILL = {"weight_scale": 0.0, "act_scale": 0.0, "learning_rate": 0.0}


def integers(setup, block: int) -> list[torch.Tensor]:
    return [linear.integers() for linear in quant_linears(setup.blocks[block])]


def far(out_features: int, in_features: int, learning_rate: float = 5e-3) -> DenseSTE:
    return DenseSTE(out_features, in_features, learning_rate, limit=30.0)


@pytest.mark.parametrize("scheme", [QuantScheme(2, 16), QuantScheme(3, 4, group_size=16)], ids=lambda s: s.label)
def test_without_learning_it_is_gptq(make_setup, make_solver, scheme):
    """Both blocks of a window, the second on what the first gives."""
    window = SlidingWindows(2).plan(4)[0]
    setup, reference = make_setup(scheme), make_setup(scheme)
    result = make_solver(kind=far, start=GPTQ(LOSS), **STILL).solve(window, setup.cache, [])
    expected = GPTQ(LOSS).solve(window, reference.cache, [])
    for block in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(integers(setup, block), integers(reference, block), strict=True))
    assert result.rec_loss_first == pytest.approx(expected.rec_loss_last, rel=1e-2)
    assert result.changed_integers == pytest.approx(expected.changed_integers, rel=1e-2)
    assert expected.changed_integers > 0.1


def test_an_overlap_goes_on_from_what_it_learned(make_setup, make_solver):
    """Only the second window's new block is started by GPTQ."""
    setup, windows = make_setup(QuantScheme(2, 16)), SlidingWindows(2, 1)
    solver = make_solver(kind=far, start=GPTQ(LOSS))
    setup.solve(solver, windows, [], num_windows=1)
    assert setup.results[0].rec_loss_last < setup.results[0].rec_loss_first < setup.results[0].rec_loss_rtn
    learned = integers(setup, 1)
    for linear in quant_linears(setup.blocks[1]):
        linear.rounding.learning_rate = 0.0
    make_solver(kind=far, start=GPTQ(LOSS), **STILL).solve(windows.plan(4)[1], setup.cache, [])
    assert all(torch.equal(a, b) for a, b in zip(integers(setup, 1), learned, strict=True))
    nearest = [
        linear.weight_quantizer.starting_integers(linear.weight).flatten(1) for linear in quant_linears(setup.blocks[2])
    ]
    assert all((a != b).any() for a, b in zip(integers(setup, 2), nearest, strict=True))


@pytest.mark.parametrize("kind", [AdaRound, LoRASTE])
def test_roundings_that_cannot_start_elsewhere(make_solver, kind):
    with pytest.raises(InputError, match="rounding=dense_ste"):
        make_solver(kind=kind, start=GPTQ(LOSS))


def test_only_gptq(make_solver):
    with pytest.raises(InputError, match="must be null or a GPTQ"):
        make_solver(start=NoReconstruction(LOSS))
    assert isinstance(make_solver(start=GPTQ(LOSS)), Reconstruction)

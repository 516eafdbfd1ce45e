"""A window that is not learned."""

import pytest
import torch

from cbq.preprocess.clipping import SmallestError
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.none import NoReconstruction
from cbq.reconstruction.windows import SlidingWindows

W4A4 = QuantScheme(4, 4)


def test_no_reconstruction_is_round_to_nearest(make_setup):
    setup, nearest, solver = make_setup(W4A4), make_setup(W4A4), NoReconstruction(ReconstructionLoss())
    setup.solve(solver, SlidingWindows(2), [])
    with quant_state(nearest.model, QuantState.NEAREST):
        assert torch.equal(setup.logits(), nearest.logits())
    assert solver.steps(8) == 0
    for result in setup.results:
        assert result.rec_loss_first == result.rec_loss_last == result.rec_loss_rtn > 0
        assert result.changed_integers == 0


def test_loss_of_round_to_nearest_is_that_of_whole_ranges(make_setup):
    """Whatever ranges preprocessing chose."""
    plain, clipped, solver = make_setup(QuantScheme(2, 16)), make_setup(QuantScheme(2, 16)), NoReconstruction
    SmallestError().apply_(clipped.model, clipped.blocks, clipped.segments)
    for setup in (plain, clipped):
        setup.solve(solver(ReconstructionLoss()), SlidingWindows(2), [], num_windows=1)
    (before,), (after,) = plain.results, clipped.results
    assert after.rec_loss_rtn == pytest.approx(before.rec_loss_rtn, rel=1e-6)
    assert after.rec_loss_first == after.rec_loss_last != after.rec_loss_rtn

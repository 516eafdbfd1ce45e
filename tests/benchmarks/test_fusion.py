"""The plain chain computes what the installed form does: values, compensation loss and every gradient."""

import pytest
import torch

from benchmarks.fusion import make_pair, pass_seconds
from benchmarks.shapes import ROUNDINGS

KINDS = [(kind, hard) for kind in ROUNDINGS for hard in (False, True) if not hard or kind in ("lora", "adaround")]


def gradients(form, learned, gradient):
    for parameter in learned:
        parameter.grad = None
    quantized, penalty = form()
    total = (quantized * gradient).sum() + (0.0 if penalty is None else 3.0 * penalty)
    total.backward()
    return quantized.detach(), penalty, [parameter.grad for parameter in learned]


@pytest.mark.parametrize(("kind", "hard"), KINDS)
def test_plain_chain_is_the_installed_form(kind, hard):
    installed, chain, learned = make_pair(24, 32, kind, hard, torch.device("cpu"))
    gradient = torch.randn(24, 32)
    quantized, penalty, grads = gradients(installed, learned, gradient)
    expected, expected_penalty, expected_grads = gradients(chain, learned, gradient)
    torch.testing.assert_close(quantized, expected)
    assert (penalty is None) == (expected_penalty is None) == (hard or kind not in ("lora", "adaround"))
    if penalty is not None:
        torch.testing.assert_close(penalty, expected_penalty)
    assert len(grads) == {"nearest": 1, "dense_ste": 2, "adaround": 2}.get(kind, 3)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert grad.abs().sum() > 0
        torch.testing.assert_close(grad, other)


def test_seconds_of_both_directions():
    form, _, learned = make_pair(24, 32, "lora", False, torch.device("cpu"))
    forward, backward = pass_seconds(form, learned, torch.randn(24, 32), shortest=0.01)()
    assert 0 < forward < 1
    assert 0 < backward < 1
    assert all(parameter.grad is None for parameter in learned)

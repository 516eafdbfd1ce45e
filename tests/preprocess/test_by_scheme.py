"""Which of two steps is applied."""

import pytest
import torch
from tiny_models import tiny_model

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.preprocess.by_scheme import ByScheme
from cbq.preprocess.clipping import SmallestError
from cbq.preprocess.none import NoPreprocessing
from cbq.preprocess.step import Preprocessing
from cbq.quant.linear import quantize_linears_
from cbq.quant.scheme import QuantScheme

SEGMENTS = torch.zeros(1, 4, dtype=torch.long)


class Step(Preprocessing):
    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.checked: list[object] = []

    def check(self, blocks) -> None:
        self.checked.append(blocks)

    def apply_(self, *arguments) -> None:
        self.calls.append(arguments)


@pytest.mark.parametrize(
    ("scheme", "activations"),
    [
        (QuantScheme(2, 16), False),
        (QuantScheme(4, 4), True),
        (QuantScheme(16, 8), True),
        (QuantScheme(4, 16, overrides=[{"linears": ".*down_proj", "act_bits": 8}]), True),
    ],
)
def test_the_scheme_decides(scheme, activations):
    model = tiny_model("llama")
    blocks = get_blocks(model)
    quantize_linears_(blocks, scheme)
    weights, both = Step(), Step()
    ByScheme(weights, both).apply_(model, blocks, SEGMENTS, "a place")
    assert (both if activations else weights).calls == [(model, blocks, SEGMENTS, "a place")]
    assert (weights if activations else both).calls == []
    ByScheme(weights, both).check(blocks)
    assert (both if activations else weights).checked == [blocks]
    assert (weights if activations else both).checked == []
    assert ByScheme(NoPreprocessing(), SmallestError()).clips_act_ranges(blocks) is activations


def test_what_is_no_step():
    with pytest.raises(InputError, match="preprocess activations must be a step of preprocessing, got 5"):
        ByScheme(Step(), 5)

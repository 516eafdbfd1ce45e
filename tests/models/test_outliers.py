"""pico with outliers: the same function, harder to quantize."""

import pytest
import torch

from cbq.errors import InputError
from cbq.models.loading import load_embedded
from cbq.models.outliers import load_with_outliers
from cbq.quant.linear import quantize_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state

IDS = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return load_embedded().model(IDS).logits


def test_a_power_of_two_leaves_the_logits_as_they_were(logits) -> None:
    loaded = load_with_outliers(factor=32.0)
    assert loaded.name == "pico_outliers"
    assert torch.equal(loaded.model(IDS).logits, logits)


def test_another_factor_leaves_them_within_float_error(logits) -> None:
    torch.testing.assert_close(load_with_outliers().model(IDS).logits, logits, rtol=1e-3, atol=1e-3)


def down_inputs(loaded) -> torch.Tensor:
    """Return |x| of the fourth block's down projection, (tokens, I)."""
    seen = []
    hook = loaded.blocks[3].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    text = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n" * 4
    loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]]))
    hook.remove()
    return seen[0][0].abs()


def test_outliers_of_every_token_and_of_few_tokens() -> None:
    plain, everywhere = down_inputs(load_embedded()), down_inputs(load_with_outliers(num_spikes=0))
    assert len((everywhere.amax(0) > 19 * plain.amax(0)).nonzero()) == 1
    spiky = down_inputs(load_with_outliers(num_channels=0))
    (spike,) = (spiky.amax(0) > 19 * plain.amax(0)).nonzero().flatten()
    # Rarely large: half of the tokens lie far below the largest, and much further than those of a usual channel.
    quiet = spiky.amax(0) / spiky.median(0).values
    assert quiet[spike] > 5 * quiet.median()


@pytest.mark.parametrize("seed", [0, 1])
def test_round_to_nearest_breaks_it(logits, seed: int) -> None:
    """Much further from the model than round-to-nearest of plain pico is."""
    distance = {}
    for name, loaded in (("plain", load_embedded()), ("outliers", load_with_outliers(seed=seed))):
        quantize_linears_(loaded.blocks, QuantScheme(4, 4))
        with quant_state(loaded.model, QuantState.NEAREST):
            probabilities = loaded.model(IDS).logits.log_softmax(-1)
        distance[name] = torch.nn.functional.kl_div(
            probabilities, logits.log_softmax(-1), log_target=True, reduction="batchmean"
        )
    assert distance["outliers"] > 5 * distance["plain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.5}, "model.factor must be a number of at least 1, got 0.5"),
        ({"factor": "a"}, "model.factor must be a number"),
        ({"num_channels": -1}, "model.num_channels must be an integer of at least 0"),
        ({"num_spikes": 1.5}, "model.num_spikes must be an integer of at least 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_with_outliers(**options)

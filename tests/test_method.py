"""Which schemes a method is for, and that every preset does what its paper claims."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from cbq.cli import conf_dir, flatten
from cbq.errors import InputError
from cbq.method import Method
from cbq.models.loading import embedded_folder
from cbq.quant.scheme import QuantScheme
from cbq.run_folder import RunFolder

BOTH = ("w2a16", "w4a4")
SCHEMES = {
    "smoothquant": ("w4a4",),
    "os_plus": ("w4a4",),
    "awq": ("w4a16",),
    "gptq": BOTH,
    "adaround": BOTH,
    "omniquant": ("w2a16",),  # at W4A4 more is asked of it, below
    "signround": BOTH,
    "cbq_best": BOTH,
    "cbq": BOTH,
}
ONE = QuantScheme(4, 16, overrides=[{"linears": ".*down_proj", "act_bits": 8}])
NOT_ONE = QuantScheme(4, 16, overrides=[{"linears": ".*down_proj", "weight_bits": 8}])
CELLS = [(method, scheme) for method, schemes in SCHEMES.items() for scheme in schemes]


@pytest.mark.parametrize(
    ("method", "good", "bad"),
    [
        (Method("weights", with_activations=False), QuantScheme(4, 16), QuantScheme(4, 8)),
        (Method("qkv", with_activations=False), QuantScheme(4, 16), QuantScheme(4, 16, qkv_bits=4)),
        (Method("one", with_activations=False), NOT_ONE, ONE),
        (Method("but-one", without_activations=False), ONE, NOT_ONE),
        (Method("both", without_activations=False), QuantScheme(4, 8), QuantScheme(4, 16)),
    ],
)
def test_schemes_that_a_method_is_not_for(method, good, bad):
    method.check(good)
    with pytest.raises(InputError, match=f"method={method.name} is for"):
        method.check(bad)


def test_every_preset_but_round_to_nearest_has_its_cells():
    names = {path.stem for path in (Path(conf_dir()) / "method").glob("*.yaml")}
    assert names - {"rtn"} == set(SCHEMES)


@pytest.fixture
def perplexities(tmp_path):
    """Return a function that runs a preset and returns its perplexities.

    On the model with outliers, where a fourth of the calibration text and a tenth of the test text are enough.
    """
    text = (embedded_folder("pico") / "test.txt").read_text(encoding="utf-8")
    (tmp_path / "test.txt").write_text(text[: len(text) // 10], encoding="utf-8")

    def run(method: str, scheme: str, *more: str) -> dict[str, float]:
        overrides = ["model=pico_outliers", f"method={method}", f"quant={scheme}", "tracking.mode=disabled"]
        overrides += ["report=none", "calibration.num_segments=16", "calibration.segment_tokens=128"]
        overrides += [f"evaluation.text_path={tmp_path / 'test.txt'}", "evaluation.segment_tokens=128", *more]
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = compose("config", overrides=overrides)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        instantiate(config.runner, folder=RunFolder(folder, config), settings=flatten(config)).run()
        results = json.loads((folder / "results.json").read_text())
        assert results["method"] == method
        return results["perplexity"]["text"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), CELLS)
def test_a_preset_is_better_than_round_to_nearest(perplexities, method, scheme):
    found = perplexities(method, scheme)
    assert found["quantized"] < found["rtn"]


@pytest.mark.slow
def test_omniquant_is_better_than_its_start(perplexities):
    """SmoothQuant's scales, and every weight's range cut a little: by itself much better than nearest."""
    rates = ("reconstruction.learning_rates.weight_scale=0", "reconstruction.scaling.learning_rate=0")
    learned, start = (perplexities("omniquant", "w4a4", *more) for more in ((), rates))
    assert learned["quantized"] < start["quantized"] < start["rtn"]

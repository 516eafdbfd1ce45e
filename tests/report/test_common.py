"""What the runs of a table have in common, of configurations that hydra composes."""

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from cbq.cli import conf_dir, flatten
from cbq.quant.scheme import QuantScheme
from cbq.report.command import describe
from cbq.report.common import common_lines, shared_settings
from cbq.report.sweep import sweep_table


@pytest.fixture
def composed(result) -> Callable[..., dict]:
    """Makes results with the settings of a command line."""

    def make(*words: str) -> dict:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = compose("config", overrides=list(words), return_hydra_config=True)
        choices = {key: choice for key, choice in config.hydra.runtime.choices.items() if "/" not in key and choice}
        with open_dict(config):
            del config["hydra"]
        label = QuantScheme(**{key: value for key, value in config.quant.items() if key != "_target_"}).label
        settings = flatten(config) | choices
        return result(**settings) | {"scheme": label, "overrides": list(words)}

    return make


def test_scheme_protocol_and_options_of_a_table_are_said(composed):
    small = ["calibration.num_segments=16", "rounding=dense_ste", "reconstruction.warmup=0.1", "tracking.mode=disabled"]
    runs = [composed(f"experiment=table5_{loss}", *small, f"seed={seed}") for loss in ("l2", "kld") for seed in (0, 1)]
    first, second = common_lines(runs)
    assert first == (
        "pico, W4A4: 4-bit asymmetric weights, one scale an output channel; 4-bit asymmetric activations, one scale a "
        "token; queries, keys and values not quantized. Calibration on 16 x 256 tokens of embedded. Perplexity over "
        "segments of 512 tokens, without overlap."
    )
    assert second == (
        "In all rows: method=cbq preprocess=cfp rounding=dense_ste cbd=default cbd.window=2 cbd.overlap=1 "
        "reconstruction=default reconstruction.epochs=3 reconstruction.batch_size=1 target=none "
        "reconstruction.warmup=0.1. By row: loss=kld,l2."
    )
    assert describe(runs, sweep_table(runs))[:2] == [first, second]


def test_every_scheme_of_a_table_is_said_and_a_column_is_not_said_again(composed):
    words = ["calibration=c4", "evaluation=none", "quant=w2a16", "method=gptq"]
    runs = [composed(*words, f"quant.group_size={size}", f"quant.qkv_bits={qkv}") for size, qkv in ((64, 16), (-1, 8))]
    first, second = common_lines(runs, sweep_table(runs).labels)
    assert first == (
        "pico, W2A16g64: 2-bit asymmetric weights, one scale 64 input features; queries, keys and values not quantized "
        "or pico, W2A16-qkv8: 2-bit asymmetric weights, one scale an output channel; queries, keys and values in 8 "
        "bits. Calibration on 128 x 2048 tokens of c4."
    )
    assert second.startswith("In all rows: method=gptq preprocess=omse_weight rounding=nearest cbd=blockwise ")
    assert "By row" not in second


def test_a_run_that_failed_has_no_say(composed, result):
    runs = [composed("quant=w4a4"), result(status="failed") | {"settings": {"quant.weight_bits": "?", "cbd.window": 0}}]
    assert common_lines(runs) == common_lines(runs[:1])
    assert common_lines(runs[1:]) == []


def test_results_that_say_little(result):
    assert common_lines([result(loss="l2")]) == ["In all rows: loss=l2."]


def test_settings_of_all_runs(result):
    runs = [result(loss="l2", a=[1]), result(loss="kld", a=[1], b=2)]
    assert shared_settings(runs) == {"seed": 0, "model": "pico", "a": [1]}

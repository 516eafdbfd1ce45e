"""Every YAML composes, binds to the signature that it feeds, and says what the paper says."""

import copy
import inspect
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from cbq.cli import conf_dir, flatten
from cbq.cli.options import check_arguments, unpin_
from cbq.errors import InputError
from cbq.streams.places import StreamPlacement

# Experiments are of all groups: tests/test_experiments.py.
OPTIONS = sorted(
    path.relative_to(conf_dir()) for path in Path(conf_dir()).glob("*/*.yaml") if path.parent.name != "experiment"
)


PIN = "4782ad278652c7c71b72204d462d6d01eaaf7549"  # of model=llama7b


@cache
def compose(*overrides: str) -> DictConfig:
    """Return a configuration, not to be changed."""
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def targets(config: DictConfig) -> list[DictConfig]:
    """Return every node that names a class or function."""
    found = [config] if "_target_" in config else []
    for key in config:
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            found += targets(config[key])
    return found


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_composes_and_binds(option):
    group, name = option.parent.name, option.stem
    config = compose(f"{group}={name}")
    for node in targets(config[group]):
        given = {key for key in node if not key.startswith("_")}
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        assert given <= set(parameters), f"{option} gives what {node['_target_']} does not take"
        required = {key for key, value in parameters.items() if value.default is value.empty}
        if not node.get("_partial_"):
            assert required <= given, f"{option} leaves out what {node['_target_']} needs"


def test_a_pinned_revision_is_a_commit_of_one_model_only():
    models = [OmegaConf.load(Path(conf_dir()) / option) for option in OPTIONS if option.parent.name == "model"]
    pins = [model.revision for model in models if model.get("revision") is not None]
    assert PIN in pins
    assert [pin for pin in pins if not (isinstance(pin, str) and re.fullmatch("[0-9a-f]{40}", pin))] == []
    assert len(set(pins)) == len(pins)  # files elsewhere name one commit for several models


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["model=llama7b"], PIN),
        (["model=llama7b", "model.name=mine"], PIN),
        (["model=llama7b", "model.revision=main"], "main"),
        (["model=llama7b", "model.path=/data/llama-7b"], None),
        (["model=llama7b", "++model.path=somebody/llama-7b"], None),
        (["model=llama7b", "model.path=somebody/llama-7b", "model.revision=v1"], "v1"),
        (["model=hf", "model.path=somebody/llama-7b", "model.revision=v1"], "v1"),
    ],
    ids=str,
)
def test_a_pin_is_of_the_models_own_repository(typed, expected):
    config = copy.deepcopy(compose(*typed))
    unpin_(config, typed)
    assert config.model.revision == expected


class AnyStep:
    """Somebody's own class."""

    def __init__(self, first: int, **options: object) -> None:
        self.options = options


class OneStep:
    def __init__(self, first: int) -> None:
        self.first = first


@pytest.mark.parametrize(("kind", "refused"), [(AnyStep, False), (OneStep, True)])
def test_what_a_class_takes_by_any_name_is_no_mistake(kind, refused):
    node = OmegaConf.create({"_target_": f"{__name__}.{kind.__name__}", "first": 1, "second": 2})
    with pytest.raises(InputError, match=r"unknown option 'preprocess\.second'") if refused else nullcontext():
        check_arguments(node, "preprocess")


def test_every_group_is_in_the_table_of_contents():
    assert {option.parent.name for option in OPTIONS} <= set(compose())


def test_defaults_of_a_real_model_are_section_5_1():
    config = compose("model=llama7b")
    settings = flatten(config)
    assert (settings["cbd.window"], settings["cbd.overlap"]) == (2, None)
    assert config.rounding._target_.endswith("LoRARounding")
    assert (settings["rounding.rank"], settings["rounding.learning_rate"]) == (5, 1e-4)
    assert settings["reconstruction.learning_rates.weight_scale"] == 1e-3
    assert settings["reconstruction.learning_rates.act_scale"] == 1e-4
    assert (settings["reconstruction.epochs"], settings["reconstruction.batch_size"]) == (3, 1)
    assert (settings["loss.l2"], settings["loss.kld"], settings["loss.mse"]) == (1, 1, 0)
    assert (settings["quant.group_size"], settings["quant.symmetric"]) == (-1, False)
    assert (settings["calibration.num_segments"], settings["calibration.segment_tokens"]) == (128, 2048)
    assert config.calibration._target_.endswith("c4")
    assert settings["evaluation.corpora"] == ["wikitext2", "c4"]
    assert settings["evaluation.segment_tokens"] == 2048


def test_debug_fast_is_small_for_every_model_and_the_user_wins():
    for overrides in ([], ["model=llama7b"], ["calibration=wikitext2"]):
        config = compose("debug=fast", *overrides)
        assert (config.calibration.num_segments, config.calibration.segment_tokens) == (4, 64)
        assert config.evaluation.corpora == []
    assert compose("debug=fast", "method=rtn").reconstruction == compose("reconstruction=none").reconstruction
    assert compose("debug=fast", "calibration.num_segments=9").calibration.num_segments == 9


@pytest.mark.parametrize("name", [option.stem for option in OPTIONS if option.parent.name == "method"])
def test_a_method_is_a_preset_and_the_user_wins(name):
    config = compose(f"method={name}")
    assert config.method.name == name
    theirs = compose(f"method={name}", "preprocess=cfp", "cbd.window=3", "reconstruction=default", "loss=kld")
    assert theirs.preprocess == compose("preprocess=cfp").preprocess
    assert theirs.reconstruction.epochs == 3
    assert (theirs.cbd.window, theirs.loss) == (3, compose("loss=kld").loss)


def test_the_embedded_model_brings_its_own_texts_and_the_user_wins():
    assert compose().calibration._target_.endswith("embedded")
    assert compose().evaluation.corpora == ["embedded"]
    assert compose("calibration=wikitext2").calibration._target_.endswith("wikitext2")
    assert compose("evaluation=perplexity").evaluation.corpora == ["wikitext2", "c4"]
    assert compose("model=hf", "calibration=embedded").calibration._target_.endswith("embedded")


@pytest.mark.parametrize("name", [option.stem for option in OPTIONS if option.parent.name == "quant"])
def test_scheme_label_is_the_file_name(name):
    assert hydra.utils.instantiate(compose(f"quant={name}").quant).label.lower().replace("*", "_star") == name


def test_activations_are_kept_where_the_python_api_does():
    assert hydra.utils.instantiate(compose().activations).__dict__ == StreamPlacement().__dict__
    assert hydra.utils.instantiate(compose("activations.cache=disk").activations).cache == "disk"


def test_settings_are_flat_and_without_duplicates():
    settings = flatten(compose("quant=w4a4"))
    assert settings["quant.weight_bits"] == 4
    hidden = ("runner", "hydra", "reconstruction.loss", "reconstruction.rounding")
    assert not any(key.startswith(hidden) for key in settings)
    assert not any("_target_" in key or "_partial_" in key for key in settings)


# As papers and released code say, or methods.md where presets differ: a preset that loses its numbers still
# runs, and is no rival any more.
PRESETS = {
    "rtn": {"preprocess": "none", "reconstruction": "none", "rounding": "nearest"},
    "smoothquant": {"preprocess.alpha": 0.5, "reconstruction": "none", "method.without_activations": False},
    "os_plus": {"preprocess.grid": 40, "preprocess.shift": True, "method.without_activations": False},
    "awq": {"preprocess.grid": 20, "preprocess.clip": True, "method.with_activations": False},
    "gptq": {
        "preprocess": "omse_weight",
        "reconstruction.damping": 0.01,
        "reconstruction.act_order": True,
        "cbd.window": 1,
    },
    "adaround": {
        "preprocess": "omse_weight",
        "reconstruction.num_steps": 1000,
        "reconstruction.warmup": 0.2,
        "reconstruction.beta_start": 20.0,
        "reconstruction.beta_end": 2.0,
        "reconstruction.compensation_weight": 400.0,
        "cbd.window": 1,
    },
    "omniquant": {
        "preprocess": "none",
        "reconstruction.learning_rates.weight_scale": 1e-2,
        "reconstruction.scaling.learning_rate": 5e-3,
        "reconstruction.scaling.alpha": 0.5,
        "reconstruction.epochs": 20,
        "reconstruction.batch_size": 1,
        "reconstruction.act_range_gradient": True,
        "reconstruction.descent.optimizer.weight_decay": 0.0,
        "loss": "mse",
        "cbd.window": 1,
    },
    "signround": {
        "preprocess": "none",
        "reconstruction.num_steps": 200,
        "reconstruction.batch_size": 8,
        "reconstruction.keep_best": True,
        "reconstruction.act_range_gradient": True,
        "reconstruction.learning_rates.weight_scale": 5e-3,
        "reconstruction.learning_rates.act_scale": 0.0,
        "rounding.learning_rate": 5e-3,
        "rounding.limit": 0.5,
        "loss": "mse",
        "cbd.window": 1,
    },
    "cbq": {"preprocess": "none", "loss": "l2_kld", "reconstruction": "default", "cbd.window": 2, "cbd.overlap": None},
    "cbq_best": {
        "preprocess": "best",
        "reconstruction": "best",
        "rounding": "dense_ste",
        "reconstruction.num_steps": 180,
        "reconstruction.act_range_gradient": True,
        "cbd.overlap": None,  # 1
    },
}


@pytest.mark.parametrize("method", PRESETS)
def test_numbers_of_a_preset(method):
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"method={method}"], return_hydra_config=True)
    settings = flatten(config) | dict(config.hydra.runtime.choices)
    assert {key: settings[key] for key in PRESETS[method]} == PRESETS[method]


def test_no_preset_is_left_out():
    assert set(PRESETS) == {option.stem for option in OPTIONS if option.parent.name == "method"}


@pytest.mark.parametrize(
    "choice",
    [
        *(f"rounding={name}" for name in ("adaround", "dense_ste", "lora", "lora_ste", "nearest")),
        "reconstruction=default",
    ],
)
def test_defaults_are_those_of_the_python_api(choice):
    """`rounding=lora` and `cbq.quantize(rounding=LoRARounding)` are one thing."""
    group = compose(choice)[choice.split("=")[0]]
    objects = ("step_size", "descent")  # compared in the tests of their own
    parameters = inspect.signature(get_object(group._target_)).parameters
    parameters = {key: p for key, p in parameters.items() if key not in objects}
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {key: group[key] for key in defaults} == defaults


def test_linear_adaround_brings_its_own_rounding_and_the_user_wins():
    assert compose("reconstruction=linear_adaround").reconstruction.rounding._target_.endswith("AdaRound")
    chosen = compose("reconstruction=linear_adaround", "rounding=dense_ste")
    assert chosen.reconstruction.rounding._target_.endswith("DenseSTE")

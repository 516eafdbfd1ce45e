"""Named experiments and the sweeps over them: a cell of the paper's tables each."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from cbq.cli import conf_dir

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (Path(conf_dir()) / "experiment").glob("*.yaml"))
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
WINDOWS = {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}
PREPROCESSING = {"none", "omse", "percentile", "os", "smoothquant", "cfp_activation", "cfp"}
# Counted by hand in the paper, less what no preset is for (RPTQ, QLLM) and full precision.
JOBS = {
    "table1": 11,
    "table2": 11,
    "table3a": 12,
    "table3b": 5,
    "table3c": 7,
    "table5": 3,
    "table6": 11,
    "table7": 10,
    "table8": 14,
    "table9": 7,
    "table10": 12,
    "table11": 2,
    "table12": 5,
    "table13": 4,
    "table14": 2,
    "table15": 2,
}


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    """Every experiment, composed."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return {name: compose("config", overrides=[f"experiment={name}"]) for name in EXPERIMENTS}


def cells(composed: dict[str, DictConfig], table: str) -> dict[str, DictConfig]:
    """Return the experiments of a table by what follows its name."""
    return {name.removeprefix(f"{table}_"): config for name, config in composed.items() if name.startswith(f"{table}_")}


def launched(override: str) -> list[str]:
    """Return the jobs that hydra makes of a sweep's override."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        return list(parser.parse_overrides([override])[0].sweep_string_iterator())


def test_every_experiment_is_a_run(composed):
    assert len(composed) == len(EXPERIMENTS) == sum(JOBS.values())
    for config in composed.values():
        assert config.model.name == "pico"
        assert 0 <= (config.cbd.overlap or 0) < config.cbd.window
        assert config.calibration.num_segments == 64  # the model's own texts


@pytest.mark.parametrize("table", JOBS)
def test_a_table_is_that_many_jobs(table):
    assert len(launched(f"experiment=glob({table}_*)")) == JOBS[table]


@pytest.mark.parametrize(
    ("table", "bits"), [("table3c", (4, 4)), ("table9", (2, 16)), ("table8_w2a16", (2, 16)), ("table8_w4a4", (4, 4))]
)
def test_windows(composed, table, bits):
    found = cells(composed, table)
    assert {(config.cbd.window, config.cbd.overlap) for config in found.values()} == WINDOWS
    for name, config in found.items():
        assert name == f"w{config.cbd.window}_o{config.cbd.overlap}"
        assert (config.quant.weight_bits, config.quant.act_bits) == bits
        assert config.preprocess == composed["table3a_cfp"].preprocess


def test_table_7_goes_on_to_eight_blocks(composed):
    found = {(config.cbd.window, config.cbd.overlap) for config in cells(composed, "table7").values()}
    assert found == WINDOWS | {(8, 0), (8, 4), (8, 7)}


@pytest.mark.parametrize("table", ["table3a", "table10"])
def test_preprocessing(composed, table):
    """With and without reconstruction, and each its own."""
    found = cells(composed, table)
    learned = {name for name, config in found.items() if "solver" in config.reconstruction._target_}
    assert learned == {"omse_recon", "percentile_recon", "os_recon", "smoothquant_recon", "cfp_recon"}
    assert found.keys() - learned == PREPROCESSING
    assert len({str(found[name].preprocess) for name in PREPROCESSING}) == len(PREPROCESSING)
    for name in learned:
        assert found[name].preprocess == found[name.removesuffix("_recon")].preprocess


def test_rounding_loss_and_rank(composed):
    kinds = {name: config.rounding._target_.rpartition(".")[2] for name, config in cells(composed, "table3b").items()}
    assert kinds == {
        "nearest": "Nearest",
        "adarounding": "AdaRound",
        "rounding": "AdaRound",
        "rounding_6epochs": "AdaRound",
        "lora": "LoRARounding",
    }
    epochs = {name: config.reconstruction.epochs for name, config in cells(composed, "table3b").items()}
    assert [name for name, number in epochs.items() if number != 3] == ["rounding_6epochs"]
    assert epochs["rounding_6epochs"] == 6
    weights = {name: (config.loss.l2, config.loss.kld) for name, config in cells(composed, "table5").items()}
    assert weights == {"l2": (1, 0), "kld": (0, 1), "l2_kld": (1, 1)}
    assert {name: config.rounding.rank for name, config in cells(composed, "table12").items()} == {
        f"rank{rank}": rank for rank in range(3, 8)
    }


def test_table_1_is_table_2_on_tasks(composed):
    perplexities, tasks = cells(composed, "table2"), cells(composed, "table1")
    assert tasks.keys() == perplexities.keys()
    for name, config in tasks.items():
        assert config.evaluation.tasks == ["piqa", "hellaswag", "arc_easy", "arc_challenge", "mutual", "ethics"]
        assert config.evaluation.corpora == []
        for group in ("quant", "preprocess", "rounding", "cbd", "loss", "reconstruction", "method"):
            assert config[group] == perplexities[name][group]


@pytest.mark.parametrize("table", ["table2", "table6", "table13", "table14"])
def test_methods(composed, table):
    """The scheme and the method are those of the name; CBQ is with its preprocessing."""
    for name, config in cells(composed, table).items():
        scheme, _, method = name.partition("_")
        assert f"w{config.quant.weight_bits}a{config.quant.act_bits}" == scheme
        assert config.method.name == method.removesuffix("_star")
        assert bool(config.quant.overrides) == method.endswith("_star")
        if config.method.name == "cbq":
            assert config.preprocess == composed["table3a_cfp"].preprocess


def test_omniquant_has_what_its_authors_scripts_add(composed):
    """At W2A16 twice the epochs, and a second target (LLaMA) or scales (OPT, table 13); at W4A4 that target (LLaMA-1)
    or other scales (LLaMA-2, table 6)."""
    preset = (20, 0, 5e-3, 0.5, False)
    added = {
        "table1_w2a16": (40, 1, 5e-3, 0.5, False),
        "table1_w4a4": (20, 1, 5e-3, 0.5, False),
        "table2_w2a16": (40, 1, 5e-3, 0.5, False),
        "table2_w4a4": (20, 1, 5e-3, 0.5, False),
        "table6_w2a16": (40, 1, 5e-3, 0.5, False),
        "table6_w4a4": (20, 0, 1e-3, 0.75, False),
        "table13_w2a16": (40, 0, 5e-3, 0.5, True),
    }
    for name, config in composed.items():
        if name.endswith("_omniquant"):
            options, table = config.reconstruction, name.removesuffix("_omniquant")
            assert options.learning_rates.weight_scale == 1e-2
            scaling = (options.scaling.learning_rate, options.scaling.alpha, options.scaling.weight_only)
            assert (options.epochs, options.homologous_weight, *scaling) == added.pop(table, preset), name
    assert not added


def test_what_is_typed_wins():
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        typed = ["experiment=table3b_lora", "rounding=dense_ste", "quant=w2a16", "cbd.window=4", "debug=fast"]
        config = compose("config", overrides=typed)
    assert config.rounding._target_.endswith("DenseSTE")
    assert config.quant.weight_bits == 2
    assert config.cbd.window == 4
    assert config.calibration.num_segments == 4


def test_every_table_has_a_sweep():
    assert {path.stem for path in SWEEPS} == set(JOBS)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_launches_the_table(path):
    """W&B's own grid of `parameters`, in the command that it would run: exactly the jobs of hydra's glob, composed."""
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sweep["method"] == "grid"
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    parameters = {key: spec.get("values", [spec.get("value")]) for key, spec in sweep["parameters"].items()}
    jobs = parameters["experiment"]
    assert sorted(jobs) == sorted(launched(f"experiment=glob({path.stem}_*)"))
    assert re.search(rf"'experiment=glob\({path.stem}_\*\)' model={','.join(parameters['model'])}\n", path.read_text())
    grid = list(itertools.product(*parameters.values()))
    assert len(grid) == len(jobs) * len(parameters["model"]) * len(parameters["seed"])
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for cell in (grid[0], grid[-1]):
            config = compose(
                "config", overrides=[f"{key}={value}" for key, value in zip(parameters, cell, strict=True)]
            )
            assert config.tracking.mode == "online"
            assert config.model.name == cell[list(parameters).index("model")]

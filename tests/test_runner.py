"""Whole runs: the embedded model, and a model of somebody else."""

import csv
import json
import math
import shutil
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_models import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_file import read_wandb_run

import cbq
from cbq.cli import conf_dir, flatten
from cbq.errors import InputError
from cbq.models.loading import embedded_folder
from cbq.quant.linear import QuantLinear, effective_bits, fuse
from cbq.quant.scheme import QuantScheme
from cbq.results import SCHEMA_PATH
from cbq.run_folder import LOG_NAME, RunFolder
from cbq.tracking.csv_files import read_rows

SMALL = ["tracking.mode=disabled", "report=none", "calibration.num_segments=4", "calibration.segment_tokens=64"]


def run(folder: Path, *overrides: str) -> dict:
    """Run cbq in this process and return its results as read from disk."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides=[*SMALL, *overrides])
    runner = instantiate(config.runner, folder=RunFolder(folder, config), settings=flatten(config))
    runner.run()
    return json.loads((folder / "results.json").read_text())


def curves(folder: Path) -> list[dict[str, str]]:
    """Return the rows of `metrics.csv` without what no two runs have in common."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {key: cell for key, cell in row.items() if key.split("/")[0] not in ("time", "memory") and "seconds" not in key}
        for row in rows
    ]


def direct_perplexity(model: torch.nn.Module, tokenizer, text: str, segment_tokens: int) -> float:
    """Return the perplexity of a text in non-overlapping segments, the plain way."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    nll, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - segment_tokens + 1, segment_tokens):
            segment = ids[start : start + segment_tokens]
            logits = model(input_ids=segment[None], use_cache=False).logits[0, :-1]
            nll += F.cross_entropy(logits.double(), segment[1:], reduction="sum").item()
            count += segment_tokens - 1
    return math.exp(nll / count)


def on_text(path: Path) -> list[str]:
    """Return the options that measure perplexity on one short text."""
    return [f"evaluation.text_path={path}", "evaluation.segment_tokens=128", "evaluation.agreement_tokens=256"]


@pytest.fixture(scope="module")
def short_text(tmp_path_factory) -> Path:
    """The first tenth of the embedded test text: enough to tell models apart, in a second."""
    text = (embedded_folder("pico") / "test.txt").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("short") / "test.txt"
    path.write_text(text[: len(text) // 10], encoding="utf-8")
    return path


@pytest.fixture
def on_tiny_llama(tiny_llama_folder, tiny_text_file) -> list[str]:
    """Return the options of a run of a model of four small blocks."""
    return ["model=hf", f"model.path={tiny_llama_folder}", "calibration=text", f"calibration.path={tiny_text_file}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_text) -> Path:
    """A finished and traced run of the embedded model: W4A4, dense straight-through rounding."""
    folder = tmp_path_factory.mktemp("runs") / "w4a4"
    options = ["quant=w4a4", "rounding=dense_ste", "debug=profile", "tracking.mode=offline", "tracking.group=table1"]
    run(folder, *options, *on_text(short_text))
    return folder


def test_results_follow_the_schema(finished):
    results = json.loads((finished / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA_PATH.read_text()))
    assert results["status"] == "finished"
    assert results["fingerprint"]["revision"] is None  # it comes with the package
    assert [(w["start"], w["stop"]) for w in results["windows"]] == [(i, i + 2) for i in range(7)]
    assert all(w["changed_integers"] > 0 and w["guard"] is None for w in results["windows"])
    assert all(w["rec_loss_last"] < w["rec_loss_rtn"] for w in results["windows"])
    perplexity = results["perplexity"]["text"]
    assert perplexity["full_precision"] < perplexity["quantized"] < perplexity["rtn"]
    bits = results["bits_per_byte"]["text"]
    assert bits["full_precision"] < bits["quantized"] < bits["rtn"]
    agreement = results["agreement"]["text"]
    assert 0 < agreement["kl_divergence"] < 1
    assert 0.5 < agreement["top1"] < 1
    assert len(agreement["block_snr_db"]) == 8
    assert agreement["num_tokens"] == 256
    assert agreement["kl_divergence"] < agreement["rtn"]["kl_divergence"]
    assert agreement["block_snr_db"][-1] > agreement["rtn"]["block_snr_db"][-1]
    assert results["cost"]["calibration_tokens"] == 4 * 64


def test_curves_hold_every_step(finished):
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cbq_step"]) for row in rows] == list(range(7 * 3 * 4))
    assert [int(row["window"]) for row in rows] == [window for window in range(7) for _ in range(12)]
    for row in rows:
        total = float(row["loss/rec"]) + float(row["loss/com"])
        assert math.isclose(total, float(row["loss/total"]), rel_tol=1e-5)
        assert math.isclose(float(row["loss/l2"]) + float(row["loss/kld"]), float(row["loss/rec"]), rel_tol=1e-5)


def test_curves_hold_losses_rates_gradients_rounding_and_costs(finished):
    """12 steps a window: its last row has what is not looked at in every step."""
    results = json.loads((finished / "results.json").read_text())
    rows = read_rows(finished / "metrics.csv")
    groups = ("weight_scale", "act_scale", "rounding")
    every_step = {"loss/l2", "loss/kld", "loss/rec", "loss/com", "loss/total", "memory/host", "time/step_seconds"}
    every_step |= {f"{kind}/{group}" for kind in ("lr", "gradient_norm") for group in groups}
    at_the_end = {"rounding/hard", "rounding/changed", "drift/weight_scale", "drift/act_scale"}
    at_the_end |= {f"window/{name}" for name in ("loss_first", "loss_last", "loss_rtn", "changed_integers", "seconds")}
    for row in rows:
        last = row["cbq_step"] % 12 == 11
        assert set(row) - {"beta"} == every_step | {"cbq_step", "window"} | (at_the_end if last else set())
        assert all(row[name] > 0 for name in every_step if name.startswith(("gradient_norm", "memory", "time")))
    for row, window in zip(rows[11::12], results["windows"], strict=True):
        assert row["window/loss_last"] == window["rec_loss_last"]
        assert row["rounding/hard"] == 1
        # Before and after the last step.
        assert row["rounding/changed"] == pytest.approx(window["changed_integers"], abs=0.01)
        assert 0 < row["drift/weight_scale"] < 0.02


def test_blocks_hold_what_rounding_did_to_each_linear(finished):
    """Against the checkpoint's integers: the errors of the fused weights, in the order of the blocks."""
    before = AutoModelForCausalLM.from_pretrained(embedded_folder("pico"), dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(finished / "checkpoint", dtype=torch.float32)
    rows = read_rows(finished / "blocks.csv")
    errors, snr = rows[:8], rows[8:]
    assert [row["block"] for row in errors] == [row["block"] for row in snr] == list(range(8))
    assert [row["cbq_step"] for row in errors] == [11, 23, 35, 47, 59, 71, 83, 83]
    for row, old, new in zip(errors, before.model.layers, after.model.layers, strict=True):
        for name, linear in old.named_modules():
            if isinstance(linear, torch.nn.Linear):
                change = (new.get_submodule(name).weight - linear.weight).square().sum() / linear.weight.square().sum()
                assert row[f"error/{name}"] == pytest.approx(change.item(), rel=1e-3)
                assert 0 < row[f"changed/{name}"] < 1
    agreement = json.loads((finished / "results.json").read_text())["agreement"]["text"]
    assert [row["snr_db/text/quantized"] for row in snr] == agreement["block_snr_db"]
    assert [row["snr_db/text/rtn"] for row in snr] == agreement["rtn"]["block_snr_db"]


def test_the_wandb_run_holds_every_row_on_its_axis(finished):
    """Against the CSV files, `results.json` and the list of what has to be there."""
    results = json.loads((finished / "results.json").read_text())
    recorded = read_wandb_run(finished)
    steps, blocks = (read_rows(finished / name) for name in ("metrics.csv", "blocks.csv"))
    assert [row for row in recorded.rows if "window" in row] == steps
    assert [row for row in recorded.rows if "block" in row] == blocks
    assert len(recorded.rows) == len(steps) + len(blocks) + 1, "and the table"

    on_steps = {name for row in steps for name in row} - {"cbq_step"}
    on_blocks = {name for row in blocks for name in row} - {"cbq_step", "block"}
    assert recorded.x_axes["*"] == "cbq_step"
    assert not on_steps & set(recorded.x_axes), "as *"
    assert {recorded.x_axes[name] for name in on_blocks} == {"block"}
    wanted = {"loss/rec", "loss/l2", "loss/kld", "loss/com", "loss/total", "beta", "rounding/hard", "rounding/changed"}
    wanted |= {f"{kind}/{group}" for kind in ("lr", "gradient_norm") for group in ("rounding", "weight_scale")}
    wanted |= {"drift/weight_scale", "drift/act_scale", "memory/host", "time/step_seconds"}
    assert wanted <= on_steps
    assert {"snr_db/text/rtn", "snr_db/text/quantized", "error/mlp.down_proj", "changed/self_attn.q_proj"} <= on_blocks

    assert recorded.config == results["settings"]
    assert recorded.config["quant.weight_bits"] == 4
    assert (recorded.name, recorded.group) == ("pico W4A4 cbq", "table1")
    assert recorded.tags == ["pico", "W4A4", "cbq"]
    assert recorded.exit_code == 0
    for part in ("perplexity", "agreement", "cost"):
        for name, figure in flatten_figures(results[part], part).items():
            assert recorded.summary[name] == figure
    (path,) = finished.glob("wandb/offline-run-*/files/media/table/windows_*.table.json")
    table = json.loads(path.read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == results["windows"]


def flatten_figures(found: dict, path: str) -> dict[str, float]:
    """Return the single numbers inside, by their paths."""
    figures = {}
    for name, value in found.items():
        if isinstance(value, dict):
            figures |= flatten_figures(value, f"{path}/{name}")
        elif isinstance(value, int | float):
            figures[f"{path}/{name}"] = value
    return figures


def test_debug_profile_leaves_a_trace(finished):
    events = json.loads((finished / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#Adam.step" for event in events) == 3
    assert "aten::mm" in (finished / "profile.txt").read_text()


def test_full_precision_and_loaded_perplexities_equal_a_direct_computation(finished, short_text):
    perplexity = json.loads((finished / "results.json").read_text())["perplexity"]["text"]
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("pico"))
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder("pico"), dtype=torch.float32)
    text = short_text.read_text(encoding="utf-8")
    assert direct_perplexity(plain, tokenizer, text, 128) == pytest.approx(perplexity["full_precision"], rel=1e-4)
    loaded = cbq.load(finished / "checkpoint")
    assert direct_perplexity(loaded.model, loaded.tokenizer, text, 128) == pytest.approx(
        perplexity["quantized"], rel=1e-4
    )
    # What activation quantization costs is in the loaded model and not in the fused weights.
    fused = AutoModelForCausalLM.from_pretrained(finished / "checkpoint", dtype=torch.float32)
    assert direct_perplexity(fused, tokenizer, text, 128) < perplexity["quantized"]


def test_rtn_is_round_to_nearest_of_every_block_linear(tmp_path, short_text):
    results = run(tmp_path / "run", "quant=w2a16", "reconstruction=none", *on_text(short_text))
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder("pico"), dtype=torch.float32)
    for module in plain.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            for row in module.weight.data:
                low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
                scale = (high - low) / 3
                zero = round(-low / scale)
                row.copy_(torch.fake_quantize_per_tensor_affine(row, scale, zero, 0, 3))
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("pico"))
    expected = direct_perplexity(plain, tokenizer, short_text.read_text(encoding="utf-8"), 128)
    perplexity = results["perplexity"]["text"]
    assert perplexity["rtn"] == pytest.approx(expected, rel=1e-3)
    assert perplexity["quantized"] == pytest.approx(perplexity["rtn"], rel=1e-6)
    assert results["effective_bits"] == pytest.approx(2.0, abs=0.1)


def test_without_baselines_the_same_model(tmp_path, on_tiny_llama, short_text):
    options = [*on_tiny_llama, "reconstruction=none", *on_text(short_text)]
    full = run(tmp_path / "full", *options)
    alone = run(tmp_path / "alone", *options, "evaluation.baselines=false")
    jsonschema.validate(alone, json.loads(SCHEMA_PATH.read_text()))
    assert full["perplexity"]["text"]["quantized"] == alone["perplexity"]["text"]["quantized"]
    assert alone["perplexity"]["text"]["full_precision"] is alone["perplexity"]["text"]["rtn"] is None


def test_one_seed_gives_the_same_bits_and_another_does_not(tmp_path, on_tiny_llama):
    options = ["quant=w2a16", "rounding=lora_ste", "reconstruction.num_steps=2", "reconstruction.epochs=null"]
    options += [*on_tiny_llama, "evaluation=none", "cbd.window=4"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, *options, f"seed={seed}")
    weights = {name: (tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in "abc"}
    found = {name: curves(tmp_path / name) for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert found["a"] == found["b"] != found["c"]


def test_where_streams_are_kept_changes_no_bit(tmp_path, on_tiny_llama):
    """Two streams and the homologous one, statistics for preprocessing and for static ranges, a short last batch."""
    options = [*on_tiny_llama, "calibration.num_segments=11", "calibration.segment_tokens=32", "evaluation=none"]
    options += ["quant=w4a4", "quant.act_granularity=tensor", "preprocess=cfp", "rounding=dense_ste"]
    options += ["reconstruction.homologous_weight=1.0", "reconstruction.epochs=1"]
    (tmp_path / "files").mkdir()
    found = {}
    for cache in ("device", "host", "disk"):
        folder = tmp_path / cache
        results = run(folder, *options, f"activations.cache={cache}", f"activations.folder={tmp_path / 'files'}")
        assert sorted(path.name for path in folder.iterdir()) == [
            "blocks.csv",
            "checkpoint",
            "config.yaml",
            "metrics.csv",
            "results.json",
            "run.log",
        ]
        windows = [{key: value for key, value in w.items() if "time" not in key} for w in results["windows"]]
        weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
        found[cache] = (weights, curves(folder), (folder / "blocks.csv").read_text(), windows)
    assert list((tmp_path / "files").iterdir()) == []
    assert found["device"] == found["host"] == found["disk"]


def test_a_model_of_the_hub_at_the_commit_of_its_preset(
    tmp_path, hub_cache, tiny_llama_folder, tiny_text_file, no_network
):
    commit = OmegaConf.load(Path(conf_dir()) / "model" / "llama7b.yaml").revision
    shutil.copytree(tiny_llama_folder, hub_cache / "models--huggyllama--llama-7b" / "snapshots" / commit)
    test_file = tmp_path / "test.txt"
    test_file.write_text(tiny_text_file.read_text(encoding="utf-8")[-20_000:], encoding="utf-8")
    results = run(
        tmp_path / "run",
        "model=llama7b",
        "calibration=text",
        f"calibration.path={tiny_text_file}",
        "calibration.num_segments=8",
        "calibration.segment_tokens=32",
        *on_text(test_file),
        "quant=w2a16",
        "quant.group_size=32",
        "rounding=dense_ste",
    )
    assert no_network == []
    assert (results["model"], results["fingerprint"]["revision"]) == ("llama7b", commit)
    assert results["scheme"] == "W2A16g32"
    assert len(results["windows"]) == 3
    assert all(w["rec_loss_last"] < w["rec_loss_rtn"] for w in results["windows"])
    assert results["protocol"]["text"]["segment_tokens"] == 128
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    loaded = cbq.load(tmp_path / "run" / "checkpoint").model
    ids = torch.arange(64)[None]
    assert torch.equal(plain(ids).logits, loaded(ids).logits)


def test_effective_bits_by_hand():
    """Integers of 2 and 4 bits and none, scales of 16, zero points where the scheme has them."""
    schemes = [QuantScheme(2, 16), QuantScheme(4, 16, group_size=4, symmetric=True), QuantScheme(16, 8)]
    model = torch.nn.Sequential(*(fuse(QuantLinear(torch.nn.Linear(8, 10), scheme)) for scheme in schemes))
    by_hand = (80 * 2 + 10 * (16 + 2)) + (80 * 4 + 20 * 16) + 80 * 16
    assert effective_bits(model) == by_hand / 240


@pytest.mark.parametrize("preprocess", ["omse", "percentile", "cfp_omse"])
def test_ranges_that_an_engine_does_not_keep_are_refused_before_any_work(tmp_path, preprocess):
    overrides = ["quant=w8a8", "target=vllm", f"preprocess={preprocess}"]
    if preprocess == "cfp_omse":  # which leaves activations alone
        overrides.append("preprocess.steps.clip.activations=true")
    with pytest.raises(InputError, match=r"preprocess\.activations must be false"):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_scales_that_a_static_range_would_not_follow_are_refused_before_any_work(tmp_path, on_tiny_llama):
    overrides = ["evaluation.corpora=[]", "method=omniquant", "quant=w4a4", "quant.act_granularity=tensor"]
    with pytest.raises(InputError, match=r"reconstruction\.scaling needs quant\.act_granularity=token"):
        run(tmp_path / "run", *on_tiny_llama, *overrides)
    assert not (tmp_path / "run").exists()


class Work(Exception):
    """Hours of it would begin here."""


@pytest.fixture
def check_export(tmp_path, on_tiny_llama, monkeypatch):
    """Return a function that runs an export of W4A4 without a target until work begins."""

    def work(*args):
        raise Work

    monkeypatch.setattr("cbq.evaluation.evaluation.Evaluation.score", work)
    monkeypatch.setattr("cbq.reconstruction.window_solver.WindowSolver.solve", work)
    return partial(
        run, tmp_path / "run", *on_tiny_llama, "evaluation.corpora=[]", "quant=w4a4", "export=compressed_tensors"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method=rtn", "preprocess=omse"],
        ["method=rtn", "preprocess=cfp_omse", "preprocess.steps.clip.activations=true"],
        ["export=autoround", "quant=w4a16"],
    ],
    ids=["learned S_X", "omse", "a step of a chain", "float32 scales in the GPTQ layout"],
)
def test_what_could_never_be_exported_is_refused_before_any_work(check_export, tmp_path, overrides):
    with pytest.raises(InputError, match=r"which no engine does: .* target=transformers|quant\.scale_dtype=float16"):
        check_export(*overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=rtn"],
        ["method=gptq"],
        ["reconstruction.learning_rates.act_scale=0", "preprocess=omse_weight"],
        ["quant.act_granularity=tensor", "preprocess=omse"],
        ["quant=w4a16", "quant.symmetric=true", "preprocess=omse"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_ranges_that_an_engine_computes_are_not_refused(check_export, overrides):
    with pytest.raises(Work):
        check_export(*overrides)


def test_preprocessing_that_changes_nothing_says_so_before_any_work(tmp_path, on_tiny_llama, capsys, monkeypatch):
    """OPT with its norms at the residual's end, whose channels cannot be scaled: said once, and written to the log."""
    shutil.copytree(on_tiny_llama[1].removeprefix("model.path="), tmp_path / "opt")
    tiny_model("opt-norm-after").save_pretrained(tmp_path / "opt")
    said = []

    def work(*args):
        said.append(capsys.readouterr().out)
        raise Work

    monkeypatch.setattr("cbq.evaluation.evaluation.Evaluation.score", work)
    options = [*on_tiny_llama, f"model.path={tmp_path / 'opt'}", "evaluation.corpora=[]", "quant=w4a4"]
    with pytest.raises(Work):
        run(tmp_path / "run", *options, "method=smoothquant")
    line = "preprocess: SmoothQuant scales nothing: this model has no channels that it can scale"
    assert " ".join(said[0].split()).count(line) == 1
    assert " ".join((tmp_path / "run" / LOG_NAME).read_text().split()).count(line) == 1

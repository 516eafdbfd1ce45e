"""Results of runs that never were."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import tiny_model, token_ids

from cbq.preprocess.none import NoPreprocessing
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.report.run_report import RunReport
from cbq.results import write_results


@pytest.fixture
def result() -> Callable[..., dict]:
    """Makes the content of a `results.json`, as far as reports read it."""

    def make(
        quantized: float | None = 16.0, seed: int = 0, model: str = "pico", status: str = "finished", **settings: object
    ) -> dict:
        finished = {
            "perplexity": {"embedded": {"full_precision": 15.0, "rtn": 70.0, "quantized": quantized}},
            "cost": {
                "reconstruction_seconds": 100.0 * (quantized or 1),
                "peak_host_memory_gib": 1.0,
                "peak_device_memory_gib": None,
            },
        }
        return {
            "format_version": 1,
            "status": status,
            "model": model,
            "scheme": str(settings.get("quant", "w4a4")).upper(),
            "seed": seed,
            "settings": {"seed": seed, "model": model} | settings,
            "environment": {"git_commit": "abc", "cbq": "0", "device_name": None, "device": "cpu", "cores": 2},
        } | (finished if status == "finished" else {})

    return make


@pytest.fixture
def run_folder(tmp_path: Path, result: Callable[..., dict]) -> Path:
    """A finished run of two windows over four blocks, with everything that a page shows."""
    windows = [
        {"start": start, "stop": start + 2, "rec_loss_first": 2.0, "rec_loss_last": 1.0, "rec_loss_rtn": 2.5}
        | {"changed_integers": 0.1, "guard": None, "wall_time_seconds": 3.0}
        for start in (0, 2)
    ]
    results = result() | {
        "method": "cbq",
        "zero_shot": {"piqa": {"full_precision": {"acc": 0.5}, "quantized": {"acc": 0.25}}},
        "agreement": {
            "embedded": {"kl_divergence": 0.5, "top1": 0.75, "block_snr_db": [9.0, 8.0, 7.0, 6.0]}
            | {"rtn": {"block_snr_db": [8.0, 6.0, 4.0, 2.0]}}
        },
        "windows": windows,
        "effective_bits": 4.25,
        "protocol": {"calibration": {"name": "c4"}},
    }
    results["cost"] |= {"wall_time_seconds": 99.0, "evaluation_seconds": 1.0, "calibration_tokens": 2048}
    write_results(tmp_path, results)
    lines = ["cbq_step,window,loss/rec,beta,memory/host"]
    lines += [f"{step},{step // 8},{1 / (step + 1)},{'' if step % 8 < 2 else 20.0},0.5" for step in range(16)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    lines = ["block,cbq_step,error/mlp.up,changed/mlp.up", *(f"{block},7,0.0{block},0.{block}" for block in range(4))]
    (tmp_path / "blocks.csv").write_text("\n".join(lines) + "\n")

    model = tiny_model("llama")
    make_quantizable_(model, model.model.layers, QuantScheme(4, 16))
    report = RunReport()
    report.begin(tmp_path, Console(quiet=True))
    with report.preprocessing(model, model.model.layers, token_ids(), NoPreprocessing()):
        pass
    report.finish_blocks(model.model.layers, range(4))
    (tmp_path / "report" / "texts.json").write_text(json.dumps({"texts": {"before": "a <b> & \u001b[31m"}}))
    return tmp_path

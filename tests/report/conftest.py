"""Results of runs that never were."""

from collections.abc import Callable

import pytest


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

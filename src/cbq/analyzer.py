"""`cbq analyze`: what in a model depends on what (the paper's Figure 1), and which linears need more bits."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from cbq.analysis.figure import Figure1
from cbq.analysis.plots import plot_figure, plot_sensitivity
from cbq.analysis.schemes import effective_bits, set_scheme_
from cbq.analysis.sensitivity import scan
from cbq.analysis.suggestion import MixedBits
from cbq.analysis.summary import print_figure, print_scan
from cbq.cost import peak_host_memory_gib
from cbq.data.calibration import Calibration
from cbq.errors import InputError, check_seed
from cbq.evaluation.evaluation import NOT_RECALLED, Evaluation, Scores
from cbq.models.loading import LoadedModel
from cbq.placement import check_fits
from cbq.preprocess.statistics import set_act_ranges_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.quantized import make_quantizable_
from cbq.results import environment, write_json

FILE_NAME = "analysis.json"


class Analyzer:
    """Analyzes one model, without quantizing it.

    Args:
        load_model: returns the full-precision model.
        scheme: what the suggestion is compared with: its bits everywhere. Its activations and granularity are those of
            everything that is measured.
        calibration: the segments that all but perplexities are measured on.
        evaluation: the texts that the suggestion is checked on.
        figure: what of Figure 1 is measured; None: nothing.
        scan: which bits are tried and what they may cost; None: nothing.
        folder: where the files go.
        settings: every option, flat, for `analysis.json`.
        command: what would quantize the model by the scheme, for the user to add the suggestion to.
        seed: of the choice of segments.

    Raises:
        InputError: there is nothing to do, no model, or something is out of range.
    """

    def __init__(
        self,
        load_model: Callable[[], LoadedModel],
        scheme: QuantScheme,
        calibration: Calibration,
        evaluation: Evaluation,
        figure: Figure1 | None,
        scan: MixedBits | None,
        folder: Path,
        settings: dict,
        command: str,
        seed: int = 0,
    ) -> None:
        check_seed("seed", seed)
        if not callable(load_model):
            raise InputError(f"nothing to analyze: model=<name> chooses a model, got {load_model!r}")
        for key, part, kind in (("figure", figure, Figure1), ("scan", scan, MixedBits)):
            if not isinstance(part, kind | None):
                raise InputError(f"{key} must be null (without it), or have options of its own, got {part!r}")
        if figure is None and scan is None:
            raise InputError("nothing to analyze: figure and scan are both null")
        if not scheme.quantizes_weights:
            raise InputError("cbq analyze is about weights: quant.weight_bits must be below 16")
        if scheme.overrides:
            raise InputError("cbq analyze suggests quant.overrides: leave them out")
        if scheme.quantizes_qkv:
            raise InputError("cbq analyze looks at linears only: quant.qkv_bits must be 16")
        self.load_model = load_model
        self.scheme = scheme
        self.calibration = calibration
        self.evaluation = evaluation
        self.figure = figure
        self.scan = scan
        self.folder = folder
        self.settings = settings
        self.command = command
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.console = Console(highlight=False)
        self.track = partial(track, console=self.console, transient=True, disable=not self.console.is_terminal)

    def run(self) -> dict:
        """Measure, print, write and draw; return what `analysis.json` holds.

        Raises:
            InputError: the model cannot be loaded, the data are missing, or an option does not fit the model.
        """
        start = time.perf_counter()
        loaded, segments = self.prepare()
        self.console.print(
            f"{loaded.name}: {len(loaded.blocks)} blocks, {segments.shape[0]} segments of {segments.shape[1]} tokens "
            f"of {self.calibration.corpus.name}, on {self.device}"
        )
        results: dict[str, Any] = {
            "model": loaded.name,
            "scheme": self.scheme.label,
            "seed": self.seed,
            "settings": self.settings,
            "protocol": self.evaluation.protocol() | {"calibration": self.calibration.describe()},
        }
        if self.figure:
            results["figure"] = self.figure.measure(loaded, self.scheme, segments, self.track)
            print_figure(self.console, results["figure"])
        if self.scan:
            full_precision = self.evaluation.score_texts(loaded, self.evaluation.recall, self.track)
            found = scan(loaded, self.scheme, self.scan.bits, segments, self.track)
            suggestion = self.scan.suggest(loaded.blocks, self.scheme, found["linears"])
            suggestion["command"] = f"{self.command} '{suggestion['option']}'"
            results |= {"sensitivity": found, "suggestion": suggestion}
            results["check"] = self.check(loaded, segments, full_precision, suggestion["overrides"])
            print_scan(self.console, results)
        results["cost"] = {
            "wall_time_seconds": time.perf_counter() - start,
            "peak_host_memory_gib": peak_host_memory_gib(),
        }
        results["environment"] = environment(str(self.device))
        write_json(self.folder / FILE_NAME, results)
        names = [FILE_NAME]
        names += plot_figure(results["figure"], self.folder) if self.figure else []
        names += plot_sensitivity(results["sensitivity"], results["suggestion"], self.folder) if self.scan else []
        said = f"{', '.join(names)} in {self.folder} after {results['cost']['wall_time_seconds']:.0f} s"
        self.console.print(said, soft_wrap=True, markup=False)
        return results

    def prepare(self) -> tuple[LoadedModel, torch.Tensor]:
        """Return the model, quantizable and on its device, and the segments; try every option before any work."""
        loaded = self.load_model()
        segments = self.calibration.sample(loaded.tokenizer, loaded.model.config.vocab_size, loaded.context, self.seed)
        if segments.shape[1] < 2:
            raise InputError("calibration.segment_tokens must be at least 2: the first token is not predicted")
        for note in self.evaluation.prepare(loaded):
            self.console.print(note)
        check_fits(loaded.model, self.device)  # without the integers, which are never made here
        make_quantizable_(loaded.model, loaded.blocks, self.scheme)
        if self.figure:
            self.figure.check(loaded)
        if self.scan:
            self.scan.budget_bits(loaded.blocks, self.scheme)
        loaded.model.to(self.device)
        return loaded, segments.to(self.device)

    def check(
        self, loaded: LoadedModel, segments: torch.Tensor, full_precision: Scores, overrides: list[dict]
    ) -> dict[str, dict[str, Any]]:
        """Return bits and perplexities, by corpus, of full precision, of the scheme, and of the suggestion."""
        schemes = {"uniform": self.scheme, "suggested": replace(self.scheme, overrides=overrides)}
        checked = {"full_precision": {"effective_bits": None, "perplexity": perplexities(full_precision)}}
        for name, scheme in schemes.items():
            set_scheme_(loaded.blocks, scheme)
            set_act_ranges_(loaded.model, loaded.blocks, segments)
            with quant_state(loaded.model, QuantState.NEAREST):
                scores = self.evaluation.score_texts(loaded, NOT_RECALLED, self.track)
            checked[name] = {"effective_bits": effective_bits(loaded.blocks), "perplexity": perplexities(scores)}
        return checked


def perplexities(scores: Scores) -> dict[str, float]:
    """Return perplexities by corpus."""
    return {corpus: score.perplexity for corpus, score in scores.texts.items()}

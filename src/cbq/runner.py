"""The whole of CBQ, in the order of the paper's Figure 2."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from cbq.activations import stream_bytes
from cbq.checkpoint import save_checkpoint
from cbq.cost import Stopwatch, peak_device_memory_gib, peak_host_memory_gib, reset_peak_device_memory
from cbq.data.calibration import Calibration
from cbq.errors import InputError, check_seed
from cbq.evaluation.evaluation import NOT_RECALLED, Evaluation, Scores
from cbq.evaluation.generation import generate_text
from cbq.evaluation.recall import Recall
from cbq.export.formats import quantized_schemes
from cbq.export.targets import NoTarget, Target
from cbq.exporter import Export, NoExport
from cbq.method import Method
from cbq.models.loading import LoadedModel
from cbq.preprocess.none import NoPreprocessing
from cbq.preprocess.statistics import expert_tokens, set_act_ranges_
from cbq.quant.linear import effective_bits
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.quantized import make_quantizable_
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import SlidingWindows, Window
from cbq.report.progress import WindowProgress
from cbq.report.run_report import NoReport
from cbq.report.scores import print_scores, summary_figures
from cbq.report.summary import print_summary
from cbq.results import environment, failure, write_results
from cbq.run_folder import RunFolder
from cbq.streams.places import Place, StreamPlacement
from cbq.tracking import RunRecorder, Tracker, agreement_rows

FEW_TOKENS = 0.1  # of an expert's even share


class Runner:
    """Quantizes one model: every argument is one axis of an experiment.

    Args:
        load_model: returns the full-precision model.
        scheme: what is quantized to how many bits.
        preprocess: what is done to the model before reconstruction.
        windows: which blocks are learned together.
        solver: how a window is solved.
        calibration: the segments that windows learn from.
        evaluation: what is measured of the model, before and after.
        activations: where the hidden states between blocks are kept.
        tracker: where curves go.
        report: the page that shows the run.
        profile: makes what traces some steps, from the folder to write to.
        target: which engine it is for.
        export: what is written for engines at the end.
        folder: the run folder.
        method: its name, and which schemes it is for.
        settings: every option, flat, for results.
        seed: of everything random.

    Raises:
        InputError: the seed is out of range; `run` raises it for everything else that the user gave.
    """

    def __init__(
        self,
        load_model: Callable[[], LoadedModel],
        scheme: QuantScheme,
        preprocess: NoPreprocessing,
        windows: SlidingWindows,
        solver: WindowSolver,
        calibration: Calibration,
        evaluation: Evaluation,
        activations: StreamPlacement,
        tracker: Tracker,
        report: NoReport,
        profile: Callable[[Path], L.Callback] | None,
        target: NoTarget | Target,
        export: Export | NoExport,
        folder: RunFolder,
        method: Method,
        settings: dict,
        seed: int,
    ) -> None:
        check_seed("seed", seed)
        method.check(scheme)
        if profile is not None and not callable(profile):
            raise InputError(f"debug.profile has options of its own, got {profile!r}: debug=profile turns it on")
        self.load_model = load_model
        self.scheme = target.constrain(scheme)
        self.constraints = changes(scheme, self.scheme)
        self.preprocess = preprocess
        self.windows = windows
        self.solver = solver
        self.calibration = calibration
        self.evaluation = evaluation
        self.activations = activations
        self.tracker = tracker
        self.report = report
        self.profile = profile and profile(folder.path)
        self.target = target
        self.export = export
        self.folder = folder
        self.method = method
        self.settings = settings | {f"quant.{name}": value for name, value in self.constraints.items()}
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.console = Console(highlight=False)
        self.track = partial(track, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.stopwatch = Stopwatch()
        self.results: dict = {}

    def run(self) -> dict:
        """Quantize, evaluate and save; return what `results.json` holds."""
        L.seed_everything(self.seed, verbose=False)
        reset_peak_device_memory(self.device)
        loaded, segments, plan, place = self.prepare()
        evaluation = self.evaluation
        full_precision = self.score(evaluation.score, loaded, "full precision", evaluation.recall, baseline=True)
        references = evaluation.remember(loaded)
        texts = {"before": generate_text(loaded.model, loaded.tokenizer, loaded.prompt)}
        self.count_expert_tokens(loaded, segments, place)
        set_act_ranges_(loaded.model, loaded.blocks, segments, place)
        with quant_state(loaded.model, QuantState.NEAREST):
            rtn = self.score(evaluation.score_texts, loaded, "round-to-nearest", baseline=True)
            nearest = evaluation.agreement(loaded, references) if evaluation.baselines else {}
        with self.report.preprocessing(loaded.model, loaded.blocks, segments, self.preprocess):
            self.preprocess.apply_(loaded.model, loaded.blocks, segments, place)
        set_act_ranges_(loaded.model, loaded.blocks, segments, place)
        windows = self.reconstruct(loaded.model, loaded.blocks, segments, plan, place)
        save_checkpoint(loaded.model, loaded.tokenizer, self.folder.path / "checkpoint")
        quantized = self.score(evaluation.score, loaded, self.scheme.label)
        agreement = evaluation.agreement(loaded, references)
        texts["after"] = generate_text(loaded.model, loaded.tokenizer, loaded.prompt)
        self.finish(
            loaded.model, evaluation.results(full_precision, rtn, quantized, agreement, nearest), windows, segments
        )
        self.report.finish(texts)
        self.publish(loaded)
        print_summary(self.console, self.results, texts, self.folder.path)
        return self.results

    def prepare(self) -> tuple[LoadedModel, torch.Tensor, list[Window], Place]:
        """Load everything and try every option, so that a mistake shows before hours of work.

        Returns:
            the model on its device, its block linears in the full-precision state; calibration token ids
            (N, T); the windows; where streams are kept.
        """
        self.tracker.check()
        loaded = self.load_model()
        plan = self.windows.plan(len(loaded.blocks))
        vocab_size = loaded.model.config.vocab_size
        segments = self.calibration.sample(loaded.tokenizer, vocab_size, loaded.context, self.seed)
        notes = self.evaluation.prepare(loaded)
        make_quantizable_(loaded.model, loaded.blocks, self.scheme)
        self.target.check(quantized_schemes(loaded.model))
        self.export.check(loaded.model)
        loaded.model.to(self.device)
        num_bytes = stream_bytes(loaded.model, loaded.blocks, segments)
        place = self.activations.choose(self.solver.num_streams, num_bytes, self.device, self.folder.path)
        self.results = {
            "status": "running",
            "model": loaded.name,
            "scheme": self.scheme.label,
            "method": self.method.name,
            "seed": self.seed,
            "settings": self.settings,
            "protocol": self.evaluation.protocol() | {"calibration": self.calibration.describe()},
            "environment": environment(str(self.device)),
        }
        self.folder.start()
        self.report.begin(self.folder.path, self.console)
        write_results(self.folder.path, self.results)
        tags = [self.scheme.label, self.method.name, loaded.name]
        self.tracker.start(
            self.folder.path, f"{loaded.name} {self.scheme.label} {self.method.name}", self.settings, tags
        )
        self.console.print(
            f"{loaded.name}: {len(loaded.blocks)} blocks to {self.scheme.label} in {len(plan)} windows, "
            f"{segments.shape[0]} segments of {segments.shape[1]} tokens, on {self.device}, "
            f"activations on {place.name}"
        )
        for note in notes:
            self.console.print(note)
        if self.constraints:
            said = ", ".join(f"{name}={value}" for name, value in self.constraints.items())
            self.console.print(f"for target={self.target.name}: {said}", soft_wrap=True)
        return loaded, segments, plan, place

    def count_expert_tokens(self, loaded: LoadedModel, segments: torch.Tensor, place: Place) -> None:
        """Record how many calibration tokens each expert is sent, if the model has any; say which learn from few."""
        counts = expert_tokens(loaded.model, loaded.blocks, segments, place)
        if counts:
            self.results["expert_tokens"] = counts
        for name, tokens in counts.items():
            few = [index for index, count in enumerate(tokens) if count < FEW_TOKENS * sum(tokens) / len(tokens)]
            if few:
                self.console.print(
                    f"few calibration tokens in {name}: "
                    + ", ".join(f"expert {index} has {tokens[index]}" for index in few)
                    + f" of {segments.numel()}"
                )

    def score(
        self,
        measure: Callable[..., Scores],
        loaded: LoadedModel,
        what: str,
        recall: Recall = NOT_RECALLED,
        baseline: bool = False,
    ) -> Scores | None:
        """Measure the model in its present state and say what came out; None for a baseline that is not asked for."""
        if baseline and not self.evaluation.baselines:
            return None
        with self.stopwatch.phase("evaluation"):
            scores = measure(loaded, recall, self.track)
        print_scores(self.console, scores, f"{what} (remembered)" if recall.num_recalled else what)
        return scores

    def reconstruct(
        self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, plan: list[Window], place: Place
    ) -> list[WindowResult]:
        """Solve every window, shown and recorded; the blocks end fused."""
        with self.stopwatch.phase("reconstruction"), WindowProgress(self.console) as progress:
            progress.start(len(plan), [self.solver.steps(len(segments))] * len(plan))
            recorder = RunRecorder(self.tracker, plan, blocks)
            callbacks = [recorder.curves, progress, *([self.profile] if self.profile else [])]

            def finish_window(result: WindowResult) -> None:
                window = plan[recorder.window]
                recorder.finish_window(result)
                self.report.finish_blocks(blocks, range(window.start, window.finished))
                progress.finish_window(result)

            return reconstruct_(model, blocks, segments, plan, self.solver, callbacks, finish_window, place)

    def finish(
        self, model: nn.Module, measured: dict[str, dict], windows: list[WindowResult], segments: torch.Tensor
    ) -> None:
        """Complete and write the results, and close the curves."""
        self.results |= {
            "status": "finished",
            **measured,
            "windows": [asdict(window) for window in windows],
            "effective_bits": effective_bits(model),
            "cost": {
                "wall_time_seconds": self.stopwatch.total_seconds(),
                "reconstruction_seconds": self.stopwatch.seconds["reconstruction"],
                "evaluation_seconds": self.stopwatch.seconds["evaluation"],
                "peak_host_memory_gib": peak_host_memory_gib(),
                "peak_device_memory_gib": peak_device_memory_gib(self.device),
                "calibration_tokens": segments.numel(),
            },
        }
        self.tracker.log_blocks(agreement_rows(measured["agreement"]))
        self.tracker.table("windows", self.results["windows"])
        shown = {key: self.results[key] for key in (*measured, "effective_bits", "cost")}
        self.tracker.finish(summary_figures(shown))
        write_results(self.folder.path, self.results)

    def publish(self, loaded: LoadedModel) -> None:
        """Write the model for an engine, if that is asked for, and record it."""
        exported = self.export.publish(loaded, self.folder.path / "export", self.results)
        if exported:
            self.results["export"] = exported
            write_results(self.folder.path, self.results)

    def fail(self, error: BaseException) -> None:
        """Write down that the run failed, if it had begun; of one whose model is finished, that its export did."""
        if self.results.get("status") == "finished":
            write_results(self.folder.path, self.results | {"export_error": failure(error)})
        elif self.results:
            self.tracker.failed()
            write_results(self.folder.path, self.results | {"status": "failed", "error": failure(error)})


def changes(wanted: QuantScheme, found: QuantScheme) -> dict:
    """Return the fields of a scheme that a target changed, with their new values."""
    return {key: value for key, value in asdict(found).items() if value != asdict(wanted)[key]}

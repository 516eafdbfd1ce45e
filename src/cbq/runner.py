"""The whole of CBQ, in the order of the paper's Figure 2."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.progress import track
from torch import nn

from cbq.activations import check_computes, stream_bytes
from cbq.checkpoint import save_checkpoint
from cbq.cost import Stopwatch, peak_memory, reset_peak_device_memory
from cbq.data.calibration import Calibration
from cbq.devices import deterministic_algorithms
from cbq.errors import InputError, check_flag, check_seed
from cbq.evaluation.evaluation import NOT_RECALLED, Evaluation, Scores
from cbq.evaluation.generation import generate_text
from cbq.evaluation.recall import Recall, fingerprint
from cbq.export.formats import quantized_schemes
from cbq.export.targets import NoTarget, Target
from cbq.exporter import Export, NoExport
from cbq.method import Method
from cbq.models.loading import LoadedModel
from cbq.placement import check_offload, place_
from cbq.preprocess.statistics import expert_tokens, set_act_ranges_
from cbq.preprocess.step import Preprocessing
from cbq.quant.linear import effective_bits
from cbq.quant.scheme import QuantScheme, changes
from cbq.quant.state import QuantState, quant_state
from cbq.quantized import make_quantizable_
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import SlidingWindows, Window
from cbq.report.experts import lines_on_few_tokens
from cbq.report.log import LoggedConsole, logged_to
from cbq.report.progress import WindowProgress
from cbq.report.run_report import NoReport
from cbq.report.scores import print_scores, summary_figures
from cbq.report.summary import print_summary
from cbq.results import environment, failure, versions, write_results
from cbq.run_folder import LOG_NAME, RunFolder
from cbq.state.run_state import RunState
from cbq.streams.places import Place, StreamPlacement
from cbq.tracking import RunRecorder, Tracker, agreement_rows


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
        offload: keep the blocks in host memory while they do not compute: true, false, or auto (see `place_`).
        tracker: where curves go.
        report: the page that shows the run.
        profile: makes what traces some steps, from the folder to write to.
        target: which engine it is for.
        export: what is written for engines at the end.
        folder: the run folder.
        method: its name, and which schemes it is for.
        settings: every option, flat, for results.
        seed: of everything random.
        save_state: after every window, so that a run that is interrupted goes on from there.
        deterministic: the same bits every time, on a GPU too, where that is slower.
        verbosity: of the terminal; see `LoggedConsole`.

    Raises:
        InputError: the seed is out of range; `run` raises it for everything else that the user gave.
    """

    def __init__(
        self,
        load_model: Callable[[], LoadedModel],
        scheme: QuantScheme,
        preprocess: Preprocessing,
        windows: SlidingWindows,
        solver: WindowSolver,
        calibration: Calibration,
        evaluation: Evaluation,
        activations: StreamPlacement,
        offload: bool | str,
        tracker: Tracker,
        report: NoReport,
        profile: Callable[[Path], L.Callback] | None,
        target: NoTarget | Target,
        export: Export | NoExport,
        folder: RunFolder,
        method: Method,
        settings: dict,
        seed: int,
        save_state: bool = True,
        deterministic: bool = False,
        verbosity: str = "normal",
    ) -> None:
        check_seed("seed", seed)
        check_flag("save_state", save_state)
        check_flag("deterministic", deterministic)
        check_offload(offload)
        method.check(scheme)
        if profile is not None and not callable(profile):
            raise InputError(f"debug.profile has options of its own, got {profile!r}: debug=profile turns it on")
        self.load_model = load_model
        self.scheme = target.constrain(scheme)
        self.constraints = changes(scheme, self.scheme)
        self.preprocess, self.windows, self.solver = preprocess, windows, solver
        self.calibration, self.evaluation = calibration, evaluation
        self.activations, self.offload = activations, offload
        self.tracker, self.report = tracker, report
        self.profile = profile and profile(folder.path)
        self.target, self.export = target, export
        self.folder, self.method = folder, method
        self.settings = settings | {f"quant.{name}": value for name, value in self.constraints.items()}
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.deterministic = deterministic
        self.console = LoggedConsole(verbosity)
        self.track = partial(track, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.stopwatch = Stopwatch()
        self.recorder = RunRecorder(tracker)
        parts = {"stopwatch": self.stopwatch, "curves": self.recorder}
        self.state = RunState(folder.state_path, solver, self.console.say, parts, save_state)
        self.results: dict = {}

    def run(self) -> dict:
        """Quantize, evaluate and save; go on where an interrupted run was. Return what `results.json` holds."""
        with deterministic_algorithms(self.deterministic), ExitStack() as self.while_running:
            return self.run_all()

    def run_all(self) -> dict:
        L.seed_everything(self.seed, verbose=False)
        reset_peak_device_memory(self.device)
        loaded, segments, plan, place = self.prepare()
        evaluation, state = self.evaluation, self.state
        full_precision = self.score(evaluation.score, loaded, "full precision", evaluation.recall, baseline=True)
        references = evaluation.remember(loaded)
        self.export.remember(loaded.model, lambda: loaded)
        texts = {} if self.offload else {"before": generate_text(loaded.model, loaded.tokenizer, loaded.prompt)}
        self.count_expert_tokens(loaded, segments, place)
        set_act_ranges_(loaded.model, loaded.blocks, segments, place)
        with quant_state(loaded.model, QuantState.NEAREST):
            rtn = self.score(evaluation.score_texts, loaded, "round-to-nearest", state.recall("rtn"), baseline=True)
            nearest = evaluation.agreement(loaded, references) if evaluation.baselines else {}
        if not state.found:
            with self.report.preprocessing(loaded.model, loaded.blocks, segments, self.preprocess):
                self.preprocess.apply_(loaded.model, loaded.blocks, segments, place)
            set_act_ranges_(loaded.model, loaded.blocks, segments, place)
            state.begin(loaded.blocks)
        windows = self.reconstruct(loaded.model, loaded.blocks, segments, plan, place)
        for note in save_checkpoint(loaded.model, loaded.tokenizer, self.folder.path / "checkpoint"):
            self.console.say(f"note: {note}")
        quantized = self.score(evaluation.score, loaded, self.scheme.label, state.recall(fingerprint(loaded.model)))
        agreement = evaluation.agreement(loaded, references)
        if not self.offload:  # every token would bring every block to the device
            texts["after"] = generate_text(loaded.model, loaded.tokenizer, loaded.prompt)
        measured = evaluation.results(full_precision, rtn, quantized, agreement, nearest)
        self.finish(loaded.model, measured, windows, segments)
        self.publish(loaded)
        self.report.finish(texts)
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
        segments = self.calibration.sample(loaded.tokenizer, loaded.model.config.vocab_size, loaded.context, self.seed)
        notes = self.evaluation.prepare(loaded)
        described = self.calibration.describe()
        here = environment(str(self.device))
        identity = versions() | {"commit": here["git_commit"], "configuration": self.folder.fingerprint()}
        identity |= {"model": fingerprint(loaded.model), "calibration": described["sha256"]}
        make_quantizable_(loaded.model, loaded.blocks, self.scheme)
        self.target.check(quantized_schemes(loaded.model))
        self.export.check(loaded.model, self.solver.learns_act_scale or self.preprocess.clips_act_ranges(loaded.blocks))
        self.preprocess.check(loaded.blocks)
        self.solver.check(loaded.blocks)
        notes = [*notes, *self.preprocess.notes(loaded.model)]
        self.offload = place_(loaded.model, self.device, self.offload)
        check_computes(loaded.model, loaded.blocks, segments)
        num_bytes = stream_bytes(loaded.model, loaded.blocks, segments)
        place = self.activations.choose(self.solver.num_streams, num_bytes, self.device, self.folder.path)
        self.state.find(identity, self.folder.goes_on)
        self.results = {
            "status": "running",
            "model": loaded.name,
            "scheme": self.scheme.label,
            "method": self.method.name,
            "seed": self.seed,
            "settings": self.settings,
            "protocol": self.evaluation.protocol() | {"calibration": described},
            "environment": here,
            "fingerprint": {"model": identity["model"], "revision": loaded.revision},
        }
        self.folder.start(self.results)
        self.while_running.enter_context(logged_to(self.folder.path / LOG_NAME))
        self.report.begin(self.folder.path, self.console)
        self.console.say(
            f"{loaded.name}: {len(loaded.blocks)} blocks to {self.scheme.label} in {len(plan)} windows, "
            f"{segments.shape[0]} segments of {segments.shape[1]} tokens, on {self.device}, "
            f"activations on {place.name}{', blocks in host memory until they compute' if self.offload else ''}"
        )
        title = [loaded.name, self.scheme.label, self.method.name]
        self.tracker.start(self.folder.path, " ".join(title), self.settings, title, self.recorder.step)
        for line in (*self.state.notes, *notes, *self.target.notes(self.constraints)):
            self.console.say(line)
        return loaded, segments, plan, place

    def count_expert_tokens(self, loaded: LoadedModel, segments: torch.Tensor, place: Place) -> None:
        """Record how many calibration tokens each expert is sent, if the model has any; say which learn from few."""
        if counts := expert_tokens(loaded.model, loaded.blocks, segments, place):
            self.results["expert_tokens"] = counts
        for line in lines_on_few_tokens(counts, segments.numel()):
            self.console.say(line)

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
        with self.stopwatch.phase("reconstruction"), WindowProgress(self.console, self.console.every_epoch) as progress:
            progress.start(len(plan), [self.solver.steps(len(segments))] * len(plan), self.recorder.window)
            self.recorder.begin(plan, blocks)
            callbacks = [self.recorder.curves, progress, *([self.profile] if self.profile else [])]

            def finish_window(result: WindowResult) -> None:
                window = self.recorder.finish_window(result)
                self.report.finish_blocks(blocks, range(window.start, window.finished))
                progress.finish_window(result)

            return reconstruct_(model, blocks, segments, plan, self.solver, callbacks, finish_window, place, self.state)

    def finish(
        self, model: nn.Module, measured: dict[str, dict], windows: list[WindowResult], segments: torch.Tensor
    ) -> None:
        """Complete and write the results, and close the curves."""
        self.results |= {
            **measured,
            "windows": [asdict(window) for window in windows],
            "effective_bits": effective_bits(model),
            "cost": self.stopwatch.cost() | peak_memory(self.device) | {"calibration_tokens": segments.numel()},
        }
        self.tracker.log_blocks(agreement_rows(measured["agreement"]))
        self.tracker.table("windows", self.results["windows"])
        self.tracker.finish(summary_figures({key: self.results[key] for key in (*measured, "effective_bits", "cost")}))

    def publish(self, loaded: LoadedModel) -> None:
        """Write the model for an engine, if that is asked for; then the run is finished, also where that failed."""
        try:
            exported = self.export.publish(loaded, self.folder.path / "export", self.results)
        except Exception as error:
            self.close({"export_error": failure(error)})
            raise
        self.close({"export": exported} if exported else {})

    def close(self, more: dict) -> None:
        """Write the results of a run that is finished, with `more`; it needs no state any longer."""
        self.results |= {"status": "finished", **more}
        write_results(self.folder.path, self.results)
        self.state.discard()

    def fail(self, error: BaseException) -> None:
        """Write down that the run failed, if it had begun and is not finished."""
        if self.results and self.results["status"] != "finished":
            self.tracker.failed()
            write_results(self.folder.path, self.results | {"status": "failed", "error": failure(error)})
            self.folder.report_failure(error, self.state.describe(), self.results["environment"])
            if not isinstance(error, KeyboardInterrupt):  # who stops a run does not wait for a page
                self.report.fail()

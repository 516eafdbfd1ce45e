"""Measuring a model without quantizing it: a checkpoint, a full-precision model, or one against the other."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from cbq.checkpoint import find_any, load_any
from cbq.errors import InputError, check_text
from cbq.evaluation.evaluation import Evaluation
from cbq.models.loading import LoadedModel
from cbq.placement import check_offload, place_
from cbq.report.scores import agreement_lines, print_scores, score_tables
from cbq.results import environment, write_json

FILE_NAME = "evaluation.json"


class Evaluator:
    """Measures what it is given.

    Args:
        load_model: returns the full-precision model; None: there is none to compare with.
        checkpoint: a folder that holds a quantized model, or a run with one; None: only the model is measured.
        evaluation: what is measured.
        folder: where `evaluation.json` goes.
        settings: every option, flat, for that file.
        offload: keep the blocks in host memory while they do not compute: true, false, or auto (see `place_`).

    Raises:
        InputError: there is neither a model nor a checkpoint, or no such folder.
    """

    def __init__(
        self,
        load_model: Callable[[], LoadedModel] | None,
        checkpoint: str | None,
        evaluation: Evaluation,
        folder: Path,
        settings: dict,
        offload: bool | str = "auto",
    ) -> None:
        check_text("checkpoint", checkpoint, optional=True)
        check_offload(offload)
        if load_model is None and checkpoint is None:
            raise InputError("nothing to evaluate: give checkpoint=<folder>, model=<name>, or both to compare them")
        if load_model is not None and not callable(load_model):
            raise InputError(f"model=<name> chooses a model, got {load_model!r}")
        self.load_model = load_model
        self.checkpoint = checkpoint
        self.checkpoint_folder = checkpoint and find_any(checkpoint)  # now: the other model may take hours
        self.evaluation = evaluation
        self.offload = offload
        self.folder = folder
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.console = Console(highlight=False)
        self.track = partial(track, console=self.console, transient=True, disable=not self.console.is_terminal)

    def run(self) -> dict:
        """Measure, print and write down; return what `evaluation.json` holds.

        Raises:
            InputError: a model cannot be loaded, or data are missing or do not fit it.
        """
        full_precision = quantized = None
        references, agreement, name = {}, {}, None
        if self.load_model is not None:
            loaded = self.load_model()
            name = loaded.name
            self.prepare(loaded)
            if self.evaluation.baselines or self.checkpoint is None:
                full_precision = self.evaluation.score(loaded, self.evaluation.recall, self.track)
                print_scores(
                    self.console,
                    full_precision,
                    f"{name} (remembered)" if self.evaluation.recall.num_recalled else name,
                )
            references = self.evaluation.remember(loaded) if self.checkpoint else {}
            del loaded
            gc.collect()  # the other one may need its memory, and an offloaded block and what keeps it hold each other
        if self.checkpoint is not None:
            loaded = load_any(self.checkpoint_folder)
            self.prepare(loaded, full_precision=False)
            quantized = self.evaluation.score(loaded, track=self.track)
            print_scores(self.console, quantized, self.checkpoint)
            agreement = self.evaluation.agreement(loaded, references)
        results = {
            "model": name,
            "checkpoint": self.checkpoint,
            "settings": self.settings,
            "protocol": self.evaluation.protocol(),
            **self.evaluation.results(full_precision, None, quantized, agreement),
            "environment": environment(str(self.device)),
        }
        for table in score_tables(results):
            self.console.print(table)
        for line in agreement_lines(agreement=results["agreement"]):
            self.console.print(f"Agreement {line}", soft_wrap=True, markup=False)
        write_json(self.folder / FILE_NAME, results)
        self.console.print(f"Results {self.folder / FILE_NAME}", soft_wrap=True, markup=False)
        return results

    def prepare(self, loaded: LoadedModel, full_precision: bool = True) -> None:
        """Read the data for a model, and bring it to the device."""
        for note in self.evaluation.prepare(loaded, full_precision):
            self.console.print(note)
        place_(loaded.model, self.device, self.offload)

"""`cbq export`: a finished checkpoint in the format of an engine."""

from collections.abc import Callable

import torch

from cbq.checkpoint import find_checkpoint, load_checkpoint
from cbq.errors import InputError
from cbq.evaluation.agreement import hash_head
from cbq.exporter import Export, NoExport
from cbq.models.loading import LoadedModel
from cbq.placement import place_
from cbq.results import read_results


class ExportCheckpoint:
    """Exports the checkpoint of a run.

    Args:
        checkpoint: its folder, or that of the run.
        export: what is written.
        load_base: returns the full-precision model, which an inexact export is told apart from; None: not known.

    Raises:
        InputError: there is no checkpoint.
    """

    def __init__(
        self, checkpoint: str, export: Export | NoExport, load_base: Callable[[], LoadedModel] | None = None
    ) -> None:
        self.folder = find_checkpoint(checkpoint)
        self.export = export
        self.load_base = load_base
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self) -> dict:
        """Write the export, and return what it is.

        Raises:
            InputError: the checkpoint is damaged, or does not fit the format.
        """
        loaded = load_checkpoint(self.folder)
        place_(loaded.model, self.device)
        self.export.check(loaded.model)
        self.export.remember(loaded.model, lambda: self.base_of(loaded))
        results = read_results(self.folder.parent) or {}
        return self.export.publish(loaded, self.folder.parent / "export", results)

    def base_of(self, loaded: LoadedModel) -> LoadedModel:
        """Return the full-precision model of a checkpoint, where it computes, in the checkpoint's type.

        Raises:
            InputError: it is not known, cannot be loaded, or is another one.
        """
        if self.load_base is None:
            raise InputError(f"it is not known which model {self.folder} was made of")
        base = self.load_base()
        base.model.to(loaded.model.dtype)
        if hash_head(base.model) != hash_head(loaded.model):
            raise InputError(f"{base.name} is not the model that {self.folder} was made of")
        place_(base.model, self.device)
        return base

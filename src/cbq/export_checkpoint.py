"""`cbq export`: a finished checkpoint in the format of an engine."""

import torch

from cbq.checkpoint import find_checkpoint, load_checkpoint
from cbq.exporter import Export
from cbq.placement import place_
from cbq.results import read_results


class ExportCheckpoint:
    """Exports the checkpoint of a run.

    Args:
        checkpoint: its folder, or that of the run.
        export: what is written.

    Raises:
        InputError: there is no checkpoint.
    """

    def __init__(self, checkpoint: str, export: Export) -> None:
        self.folder = find_checkpoint(checkpoint)
        self.export = export

    def run(self) -> dict:
        """Write the export, and return what it is.

        Raises:
            InputError: the checkpoint is damaged, or does not fit the format.
        """
        loaded = load_checkpoint(self.folder)
        place_(loaded.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.export.check(loaded.model)
        results = read_results(self.folder.parent) or {}
        return self.export.publish(loaded, self.folder.parent / "export", results)

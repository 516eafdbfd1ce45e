"""`cbq export`: a finished checkpoint in the format of an engine."""

import torch

from cbq.checkpoint import find_checkpoint, load_checkpoint
from cbq.evaluation.perplexity import PerplexityEvaluation
from cbq.exporter import Export
from cbq.results import read_results


class ExportCheckpoint:
    """Exports the checkpoint of a run.

    Args:
        checkpoint: its folder, or that of the run.
        export: what is written.
        evaluation: the text that the engine is compared on.
    """

    def __init__(self, checkpoint: str, export: Export, evaluation: PerplexityEvaluation) -> None:
        self.folder = find_checkpoint(checkpoint)
        self.export = export
        self.evaluation = evaluation

    def run(self) -> dict:
        """Write the export, and return what it is.

        Raises:
            InputError: the checkpoint is damaged, or does not fit the format.
        """
        loaded = load_checkpoint(self.folder)
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.export.check(loaded.model)
        self.evaluation.prepare(loaded.tokenizer, loaded.model.config.vocab_size, loaded.context)
        results = read_results(self.folder.parent) or {}
        return self.export.publish(loaded, self.folder.parent / "export", self.evaluation, results)

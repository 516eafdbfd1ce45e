"""The curves of a run: CSV files, a Weights & Biases run and TensorBoard, each a sink of the same rows.

Rows lie on one of two axes: `cbq_step`, the optimizer steps of all windows together, and `block`.
"""

from cbq.tracking.recorder import RunRecorder, agreement_rows
from cbq.tracking.tracker import Tracker

__all__ = ["RunRecorder", "Tracker", "agreement_rows"]

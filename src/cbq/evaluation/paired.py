"""Whether two models differ on the same items, or only seem to.

Shapes: n items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class PairedDifference:
    """What quantization did to the score of a task, item by item.

    Args:
        mean: of quantized minus full precision.
        stderr: standard error of the mean; NaN for a single item.
        p_value: how often chance alone would give so one-sided a result if quantization did nothing.
        num_higher: items whose score rose.
        num_lower: items whose score fell.
    """

    mean: float
    stderr: float
    p_value: float
    num_higher: int
    num_lower: int


def paired_difference(full_precision: Sequence[float], quantized: Sequence[float]) -> PairedDifference:
    """Compare two models on the same items; most items give the same score, and say nothing.

    Args:
        full_precision: the score of each item, (n,).
        quantized: the same of the quantized model, in the same order, (n,).

    Returns:
        The mean difference with its standard error, and the two-sided sign test on the items that changed; where
        scores are 0 and 1 this is McNemar's exact test.

    Source:
        McNemar (1947), Psychometrika 12: the exact form, by the binomial distribution.

    Example:
        >>> paired_difference([1, 1, 1, 0], [1, 0, 0, 0])
        PairedDifference(mean=-0.5, stderr=0.28867513459481287, p_value=0.5, num_higher=0, num_lower=2)
    """
    differences = [after - before for before, after in zip(full_precision, quantized, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1) if count > 1 else math.nan
    higher, lower = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    p_value = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    return PairedDifference(mean, math.sqrt(variance / count), p_value, higher, lower)


def mean_difference(parts: Sequence[PairedDifference]) -> PairedDifference:
    """Return the difference of a mean over tasks, each of the same weight, whose items are not the same.

    Args:
        parts: of each task, at least one.

    Returns:
        The mean with its standard error, and the sign test on all changed items together.
    """
    higher, lower = sum(part.num_higher for part in parts), sum(part.num_lower for part in parts)
    return PairedDifference(
        mean=math.fsum(part.mean for part in parts) / len(parts),
        stderr=math.hypot(*(part.stderr for part in parts)) / len(parts),
        p_value=float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0,
        num_higher=higher,
        num_lower=lower,
    )

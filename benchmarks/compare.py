"""This run's rows beside a baseline's: what got worse by more than the noise.

Noise is measured: a row's is the range of its repeats. A change counts where it exceeds the larger of the two runs'.
"""

from benchmarks.rows import Row

SMALLEST_NOISE = 0.02  # of the value: repeats within one process do not show what differs between two
UNREPEATED_NOISE = 0.1  # of the value, or of 1 for exponents near 0, where there was one sample only
SAME_MACHINE = ("device", "device_name", "cores", "threads", "platform", "torch")


def noise(row: Row) -> float:
    """Return by how much a row may differ from another run's without meaning anything, in its own unit.

    Example:
        >>> noise(Row("step", "A / B", "pico", (1.0, 1.5, 1.25)))
        0.5
        >>> noise(Row("step", "A / B", "pico", (5.0, 5.0)))
        0.1
    """
    if len(row.samples) == 1:
        return UNREPEATED_NOISE * max(1.0, abs(row.value))
    return max(row.high - row.low, SMALLEST_NOISE * abs(row.value))


def verdict(now: Row, then: Row | None) -> str:
    """Return what became of a row since the baseline, for every row: `new`, `worse`, `better`, `same`, or nothing.

    Nothing is said of a row that is not judged: of a share, higher is neither.

    Example:
        >>> then = Row("step", "A / B", "pico", (1.0, 1.0, 1.1))
        >>> verdict(Row("step", "A / B", "pico", (1.3, 1.3, 1.3)), then)
        'worse'
    """
    if then is None:
        return "new"
    if not now.judged:
        return ""
    tolerance = max(noise(now), noise(then))
    if now.value > then.value + tolerance:
        return "worse"
    return "better" if now.value < then.value - tolerance else "same"


def other_machine(now: dict, then: dict) -> str | None:
    """Return in what two environments differ that ratios may depend on, in one line, or None."""
    differences = [
        f"{name} {then.get(name)} -> {now.get(name)}" for name in SAME_MACHINE if now.get(name) != then.get(name)
    ]
    return f"the baseline is of another machine: {', '.join(differences)}" if differences else None

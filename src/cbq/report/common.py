"""What the runs of a table have in common: a figure says little without its scheme and its protocol."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from cbq.export.card import describe as in_words
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.windows import SlidingWindows
from cbq.report.again import plain
from cbq.report.sweep import tells_rows

# What is said of every table, as far as its runs have it, in this order; then what was typed besides.
SAID = (
    "method",
    "preprocess",
    "rounding",
    "rounding.rank",
    "cbd",
    "cbd.window",
    "cbd.overlap",
    "loss",
    "reconstruction",
    "reconstruction.epochs",
    "reconstruction.batch_size",
    "target",
)
SCHEME = tuple(f"quant.{field.name}" for field in fields(QuantScheme))
IN_WORDS = {
    "quant.weight_bits",
    "quant.act_bits",
    "quant.group_size",
    "quant.symmetric",
    "quant.act_symmetric",
    "quant.act_granularity",
    "quant.qkv_bits",
    "calibration.num_segments",
    "calibration.segment_tokens",
    "evaluation.segment_tokens",
    "evaluation.stride",
}


def common_lines(runs: Sequence[Mapping], columns: Sequence[str] = ()) -> list[str]:
    """Return two lines: scheme, calibration and evaluation in words; and the options of all rows.

    Where rows differ, every value is said. Runs that failed have no figures, and no say.

    Args:
        runs: contents of `results.json`; what a run does not say is left out.
        columns: options that the table has a column of.
    """
    runs = [run for run in runs if run["status"] != "failed"]
    sentences = [either(map(say, runs)) for say in (scheme, calibration, evaluation)]
    shared, different = options(runs, columns)
    words = [f"{start}: {' '.join(each)}" for start, each in (("In all rows", shared), ("By row", different)) if each]
    return [". ".join(filter(None, line)) + "." for line in (sentences, words) if any(line)]


def either(texts: Iterable[str]) -> str:
    """Return what is said, each once.

    Example:
        >>> either(["W4A4", "", "W2A16", "W4A4"])
        'W4A4 or W2A16'
    """
    return " or ".join(dict.fromkeys(filter(None, texts)))


def scheme(run: Mapping) -> str:
    """Return the model, bits, granularity and symmetry of a run."""
    settings = run["settings"]
    if "quant.weight_bits" not in settings:
        return ""
    found = QuantScheme(**{key.removeprefix("quant."): settings[key] for key in SCHEME if key in settings})
    qkv = f"in {found.qkv_bits} bits" if found.quantizes_qkv else "not quantized"
    return f"{run['model']}, {run['scheme']}: {in_words(found)}; queries, keys and values {qkv}"


def calibration(run: Mapping) -> str:
    """Return what a run is calibrated on."""
    settings = run["settings"]
    if not {"calibration", "calibration.num_segments", "calibration.segment_tokens"} <= settings.keys():
        return ""
    size = f"{settings['calibration.num_segments']} x {settings['calibration.segment_tokens']} tokens"
    return f"Calibration on {size} of {settings['calibration']}"


def evaluation(run: Mapping) -> str:
    """Return how perplexity is measured, if it is."""
    settings = run["settings"]
    measures = settings.get("evaluation.corpora") or settings.get("evaluation.text_path")
    if not measures or "evaluation.segment_tokens" not in settings:
        return ""
    stride = settings.get("evaluation.stride")
    overlap = "without overlap" if stride is None else f"a new one every {stride}"
    return f"Perplexity over segments of {settings['evaluation.segment_tokens']} tokens, {overlap}"


def options(runs: Sequence[Mapping], columns: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return options that are the same in all rows, and those that are not and have no column, as they are typed.

    The latter with one value only are options that not every row has, such as the epochs where something is learned.

    Example:
        >>> runs = [{"settings": {"loss": loss, "rounding": "dense_ste"}} for loss in ("l2", "kld")]
        >>> options(runs)
        (['rounding=dense_ste'], ['loss=kld,l2'])
    """
    stated = [settled(run["settings"]) for run in runs]
    typed = dict.fromkeys(word.partition("=")[0].lstrip("+") for run in runs for word in run.get("overrides", []))
    shared, different = [], []
    for key in dict.fromkeys([*SAID, *(key for key in typed if "." in key and tells_rows(key))]):
        if key in IN_WORDS:
            continue
        values = sorted({plain(settings[key]) for settings in stated if key in settings})
        if len(values) == 1 and all(key in settings for settings in stated):
            shared.append(f"{key}={values[0]}")
        elif values and key not in columns:
            different.append(f"{key}={','.join(values)}")
    return shared, different


def settled(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's settings with the overlap that windows have where none was said."""
    if "cbd.window" not in settings:
        return settings
    windows = SlidingWindows(settings["cbd.window"], settings.get("cbd.overlap"))
    return {**settings, "cbd.overlap": windows.overlap}


def shared_settings(runs: Sequence[Mapping]) -> dict[str, Any]:
    """Return every option that is the same in all runs."""
    first, *others = [run["settings"] for run in runs]
    return {
        key: value
        for key, value in first.items()
        if all(key in settings and settings[key] == value for settings in others)
    }

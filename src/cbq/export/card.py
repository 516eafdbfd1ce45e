"""The README.md of an export: what it is made of, what was measured, how it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cbq.export.size import Size
from cbq.quant.scheme import QuantScheme


def describe(scheme: QuantScheme) -> str:
    """Return a linear's scheme in words.

    Example:
        >>> describe(QuantScheme(4, 8, symmetric=True))
        '4-bit symmetric weights, one scale an output channel; 8-bit asymmetric activations, one scale a token'
    """
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    scales = "an output channel" if scheme.group_size == -1 else f"{scheme.group_size} input features"
    words = f"{scheme.weight_bits}-bit {kind} weights, one scale {scales}"
    if not scheme.quantizes_activations:
        return words
    kind = "symmetric" if scheme.act_symmetric else "asymmetric"
    scales = "a token" if scheme.act_granularity == "token" else "a linear, found on the calibration data"
    return f"{words}; {scheme.act_bits}-bit {kind} activations, one scale {scales}"


def perplexity_table(perplexity: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the lines of a table of perplexities, as `results.json` has them."""
    lines = ["| text | full precision | round-to-nearest | this model |", "|---|---|---|---|"]
    for corpus, states in perplexity.items():
        values = (states.get(state) for state in ("full_precision", "rtn", "quantized"))
        lines.append(f"| {corpus} | " + " | ".join("-" if value is None else f"{value:.4g}" for value in values) + " |")
    return lines


def hub_id(results: Mapping) -> str | None:
    """Return the hub id of the full-precision model; None: it is not from the hub, or not known. Only what is has a
    commit, and its path is the id then."""
    return results["settings"]["model.path"] if results.get("fingerprint", {}).get("revision") else None


def base_model(results: Mapping) -> str:
    """Return what the full-precision model is, in words: of a folder the last part, the rest is nobody's business.

    Example:
        >>> base_model({"model": "mine", "settings": {"model.path": "/home/me/llama-2-7b"}})
        'mine, llama-2-7b'
    """
    if name := hub_id(results):
        source = [name, f"commit {results['fingerprint']['revision']}"]
    else:
        source = [Path(results.get("settings", {}).get("model.path") or "").name]
    return ", ".join(dict.fromkeys(part for part in (results["model"], *source) if part))


def card(
    results: Mapping,
    schemes: Mapping[str, QuantScheme],
    size: Size,
    loading: Sequence[str],
    proof: str,
    notes: Sequence[str],
) -> str:
    """Return the text of a model card.

    Args:
        results: of the run that made the model, as far as they are known.
        schemes: of the quantized linears, by name.
        size: on disk.
        loading: how each engine loads the folder, as Markdown.
        proof: what came of the comparison with an engine, in words.
        notes: what a user must know, a line each.
    """
    counts: dict[str, int] = {}
    for scheme in schemes.values():
        counts[describe(scheme)] = counts.get(describe(scheme), 0) + 1
    title = " ".join(str(results[key]) for key in ("model", "scheme") if key in results) or "Quantized model"
    known = [f"base_model: {name}", "base_model_relation: quantized"] if (name := hub_id(results)) else []
    lines = ["---", *known, "tags: [quantized, cbq]", "---", "", f"# {title}", ""]
    made = [f"- Base model: {base_model(results)}"] if "model" in results else []
    made += [f"- Method: {results['method']}"] if "method" in results else []
    calibration = results.get("protocol", {}).get("calibration")
    if calibration:
        made.append(
            f"- Calibration: {calibration['num_segments']} segments of {calibration['segment_tokens']} tokens of "
            f"{calibration['name']}"
        )
    made += [f"- Scheme: {words} ({count} linears)" for words, count in counts.items()]
    made.append(f"- Size: {size}")
    lines += [*made, "- Made with cbq, cross-block quantization (arXiv 2312.07950)", ""]
    if results.get("perplexity"):
        lines += ["## Perplexity", "", *perplexity_table(results["perplexity"]), ""]
    lines += ["## Does an engine compute the same?", "", proof, *(f"\n{note}" for note in notes), ""]
    lines += ["## Loading", "", *loading, ""]
    return "\n".join(lines)

"""Mixtures of experts: what is said of their calibration."""

FEW_TOKENS = 0.1  # of an expert's even share


def lines_on_few_tokens(counts: dict[str, list[int]], num_tokens: int) -> list[str]:
    """Return a line for each mixture with experts that learn from few tokens.

    Args:
        counts: by a mixture's name, the tokens that each expert is sent.
        num_tokens: of the calibration segments.

    Example:
        >>> lines_on_few_tokens({"blocks.0.mlp": [97, 1]}, 98)
        ['few calibration tokens in blocks.0.mlp: expert 1 has 1 of 98']
    """
    lines = []
    for name, tokens in counts.items():
        few = [index for index, count in enumerate(tokens) if count < FEW_TOKENS * sum(tokens) / len(tokens)]
        if few:
            having = ", ".join(f"expert {index} has {tokens[index]}" for index in few)
            lines.append(f"few calibration tokens in {name}: {having} of {num_tokens}")
    return lines

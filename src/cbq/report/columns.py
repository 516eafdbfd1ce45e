"""What a table's columns hold besides perplexities."""

SECONDS = "seconds"  # of reconstruction
MEMORY = "GiB"  # the peak: of the GPU where there is one
COSTS = frozenset({SECONDS, MEMORY})

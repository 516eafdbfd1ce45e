"""Models: where their blocks are, and how to load one. The only door to transformers."""

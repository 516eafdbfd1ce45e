"""Evaluation: what a quantized model has lost."""

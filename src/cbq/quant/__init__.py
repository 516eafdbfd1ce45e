"""Quantization of tensors and linears: knows no language model (paper sections 3.2 and 5.1)."""

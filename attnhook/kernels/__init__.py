"""Kernels that reduce attention next to the key cache."""

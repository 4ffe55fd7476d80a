"""Triton kernels and launch helpers that several backends use; imported only where Triton is."""

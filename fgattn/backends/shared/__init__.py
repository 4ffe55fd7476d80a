"""Triton kernels and launch helpers that several backends use. `available` and `costs` need no Triton."""

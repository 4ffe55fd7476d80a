"""Sampling runs: which calls run sparse, and what a run did."""

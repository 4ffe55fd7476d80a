"""Measurements: `python -m benchmarks NAME`. Results are CSV files in `results/`."""

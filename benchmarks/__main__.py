"""python -m benchmarks NAME [--quick]: measure on this machine's GPU, write results/NAME.csv."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import kernel, measure, pipeline, small_tiles

BENCHMARKS = {"kernel": kernel.rows, "pipeline": pipeline.rows, "small_tiles": small_tiles.rows}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="fewer settings")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", default=measure.checked_out(), help="that is measured (default: git's)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: nothing is measured")
    measure.write(options.name, BENCHMARKS[options.name](quick=options.quick), options.out, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""python -m benchmarks NAME ... [--quick]: measure. Names are kernel, plan, quality, generations, end2end,
methods, reuse, breakeven and first_use.
python -m benchmarks report: write tables and plots of the results into the READMEs."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import measure, report, runner
from .registry import REGISTRY


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=[*REGISTRY, "report"], metavar="name")
    parser.add_argument("--quick", action="store_true", help="fewer settings, seeds and peers")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the CSV files")
    parser.add_argument("--commit", default=measure.checked_out(), help="that is measured (default: git's)")
    options = parser.parse_args(arguments)
    if options.names != ["report"] and not torch.cuda.is_available():
        parser.error("no CUDA GPU: nothing is measured")
    for name in options.names:
        if name == "report":
            report.write(options.out)
        else:
            runner.run(name, REGISTRY[name], options.quick, options.out, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

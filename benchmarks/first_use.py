"""First use: from the import of the library to the end of the first sparse call, in a process of its own.

First with an empty Triton cache, then with what that has left there; alone, and beside processes that keep a
core busy each, as other programs on a user's machine do. `python -m benchmarks.first_use --busy N` prints the
rows of another number of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .targets import MEASURED

ROOT = Path(__file__).parents[1]
BUSY = 8  # processes
PROGRAM = """
import json, logging, time
import torch
q, k, v = torch.randn(3, 1, 12, 21 * 30 * 52, 128, device="cuda", dtype=torch.bfloat16).unbind()
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
log = logging.getLogger("fgattn")
log.setLevel(logging.INFO)
log.addHandler(Keep())
torch.cuda.synchronize()
marks = [time.perf_counter()]
from fgattn import Settings, TokenLayout
from fgattn.runs.engine import Engine
from fgattn.settings import Policy
marks.append(time.perf_counter())
one = Engine(Settings(), Policy(warmup_steps=0))
one.begin_run([1.0, 0.0], True, q.device)
marks.append(time.perf_counter())
one.begin_evaluation(1.0)
one.attention(q, k, v, layout=TokenLayout((21, 30, 52)), dense=q.clone, block=0)
torch.cuda.synchronize()
marks.append(time.perf_counter())
calls = {reason.text: number for reason, number in one.end_run().calls.items()}
print(json.dumps({"marks": marks, "calls": calls, "said": said}))
"""


class FirstUse(NamedTuple):
    """What a process of its own took and did."""

    imports: float  # seconds of importing the library
    selftest: float  # seconds of starting the run, which tests and compiles the kernels
    call: float  # seconds of the first call
    calls: dict[str, int]  # number of calls by outcome
    compiled: list[str]  # kernels, as the log names them

    @property
    def seconds(self) -> float:
        return self.imports + self.selftest + self.call


def first_use(cache: Path) -> FirstUse:
    """Run PROGRAM with a folder as Triton's cache.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        timeout=300,
    )
    if run.returncode:
        raise RuntimeError(f"first use failed: {run.stderr[-1000:]}")
    found = json.loads(run.stdout)
    start, imported, tested, end = found["marks"]
    compiled = [line.rpartition(" ")[2] for line in found["said"] if "is compiling kernels, once: " in line]
    return FirstUse(imported - start, tested - imported, end - tested, found["calls"], compiled)


def rows(quick: bool) -> Iterator[dict]:
    """Alone, unless quick, and beside BUSY processes."""
    for busy in (BUSY,) if quick else (0, BUSY):
        yield from rows_beside(busy)


def rows_beside(busy: int) -> Iterator[dict]:
    """A row with an empty cache and one with a filled one, beside so many busy processes."""
    with tempfile.TemporaryDirectory() as cache, busy_processes(busy):
        for state in ("empty", "filled"):
            found = first_use(Path(cache))
            yield {
                "case": "first use",
                "busy": busy,
                "cache": state,
                "seconds": found.seconds,
                "import_s": found.imports,
                "selftest_s": found.selftest,
                "call_s": found.call,
                "kernels": len(found.compiled),
                "status": MEASURED if found.calls == {"sparse": 1} else f"withheld: {found.calls}",
            }


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_use")
    parser.add_argument("--busy", type=int, default=BUSY, metavar="N", help="busy processes beside it")
    for row in rows_beside(parser.parse_args().busy):
        print(json.dumps(row))

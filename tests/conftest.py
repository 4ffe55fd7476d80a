"""Loads the library as `fgattn`, and fills what it leaves unwritten with NaN."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(name: str, path: Path):
    """Import a file, or a package by its folder, under a name of our choice."""
    if name not in sys.modules:
        init = path / "__init__.py"
        spec = (
            importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(path)])
            if path.is_dir()
            else importlib.util.spec_from_file_location(name, path)
        )
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


load("fgattn", ROOT / "fgattn")
load("benchmarks", ROOT / "benchmarks")
load("makers", ROOT / "tests" / "makers.py")
load("calls", ROOT / "tests" / "calls.py")
load("tiers", ROOT / "tests" / "tiers.py")
record = load("record", ROOT / "tests" / "record.py")
pages = load("pages", ROOT / "tests" / "pages.py")
torch.set_num_threads(1)  # the tensors are small; threads would only wait for each other


def pytest_sessionstart():
    """The tier of another Triton must not pass with the one that is installed."""
    expected = os.environ.get("EXPECTED_TRITON")
    if not expected:
        return
    import triton

    if triton.__version__ != expected:
        pytest.exit(f"Triton {expected} was asked for, {triton.__version__} was loaded", returncode=2)


@pytest.fixture(scope="session")
def pack_root():
    """The root `__init__.py` as ComfyUI loads it, under a name of its own; imports no ComfyUI."""
    return load("fgattn_pack", ROOT)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    with pages.chromium() as started:
        yield started


def pytest_addoption(parser):
    parser.addoption("--record", metavar="TIER=FILE", help="write a row of what a whole tier ran with")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    found = {key: len(reports) for key, reports in terminalreporter.stats.items()}
    whole = exitstatus in (0, 1) and "passed" in found and "deselected" not in found
    if config.option.record and whole and not hasattr(config, "workerinput"):  # not each worker of xdist
        tier, _, file = config.option.record.partition("=")
        failed = found.get("failed", 0) + found.get("error", 0)
        record.write(Path(file), [record.row(tier, found["passed"], failed, found.get("skipped", 0))])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: the kernels are not run on a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised tensors of our package hold NaN or huge integers, so that a missed write shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make):
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        result = make(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fgattn"):
            kind = result.dtype
            result.fill_(
                float("nan")
                if kind.is_floating_point
                else True
                if kind == torch.bool
                else torch.iinfo(kind).max
            )
        return result

    return wrapper

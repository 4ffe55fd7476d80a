"""Kernels in Triton's interpreter, which has to be chosen before they are imported."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(
        reason="needs a process of its own: TRITON_INTERPRET=1 python -m pytest tests/interpret"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)

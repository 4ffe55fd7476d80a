"""The record of what was tested, and the documents that quote it."""

import subprocess
import sys
from pathlib import Path

import pytest
import record

ROOT = Path(__file__).parents[2]


def made(**other):
    names = (*record.ENVIRONMENT, *record.OUTCOME)
    usual = {"tier": "gpu", "torch": "2.11.0+cu130", "triton": "3.6.0", "python": "3.12.1", "gpu": "H200"}
    return (
        dict.fromkeys(names) | usual | {"comfyui": "0.19.3", "passed": 5, "failed": 0, "skipped": 1} | other
    )


@pytest.mark.parametrize("name", ["README.md", "docs/compatibility.md"])
def test_documents_say_what_the_record_says(name):
    """After a change of the record: python tests/record.py."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- tested: " in text
    assert record.rendered(text, record.read(record.RECORD)) == text


def test_a_later_run_replaces_its_row():
    """Of the same environment only."""
    first, later, other = made(), made(passed=6), made(torch="2.13.0")
    assert record.merged([first, other], [later]) == record.merged([], [other, later])


def test_what_failed_is_not_tested_with():
    """An environment with a failure in any tier is in the table, but not in the line."""
    newer = {"triton": "3.9.0", "gpu": None}
    rows = [made(), made(tier="compile", failed=1, **newer), made(tier="interpret", **newer)]
    assert "torch 2.11; Triton 3.6; CPU, H200: " in record.line(rows)
    assert "| 2.11.0+cu130 | 3.9.0 | 5 passed, 1 failed | 5 passed, 0 failed |" in record.triton_table(rows)
    assert "|  | 3.8.0 | not run | not run | not run |" in record.triton_table(rows)


def test_a_run_writes_its_row_only_when_asked_for_and_whole(tmp_path):
    """The option of pytest, on a file of this tier."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_map_chart.py"]
    for more in ([], ["-k", "nothing", "--record"], ["--record"]):
        more = more and [*more, f"unit={tmp_path / 'made.json'}"]
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True)
        assert (tmp_path / "made.json").exists() == (len(more) == 2)
    (written,) = record.read(tmp_path / "made.json")
    assert written["tier"] == "unit" and written["passed"] > 0 == written["failed"] and written["commit"]

"""The runner of the tiers: what is red, and why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiers

ROOT = Path(__file__).parents[2]


def report(tests, failures=0, errors=0, reasons=()):
    """A JUnit report as pytest writes it."""
    skips = "".join(f'<testcase><skipped message="{reason}"/></testcase>' for reason in reasons)
    return (
        f'<testsuites><testsuite tests="{tests}" failures="{failures}" errors="{errors}" '
        f'skipped="{len(reasons)}">{skips}</testsuite></testsuites>'
    )


@pytest.mark.parametrize(
    ("code", "text", "passed", "failed", "red", "why"),
    [
        (0, report(5, reasons=["no GPU"]), 4, 0, False, ""),
        (1, report(5, failures=1), 4, 1, True, "tests failed"),
        (2, report(1, errors=1), 0, 1, True, "tests failed"),
        (3, report(5), 5, 0, True, "pytest ended with code 3"),
        (
            0,
            report(3, reasons=["a", "b", "b"]),
            0,
            0,
            True,
            "all 3 tests are skipped, most of them because: b",
        ),
        (5, report(0), 0, 0, True, "there are no tests, and pytest ended with code 5"),
        (-11, None, 0, 0, True, "pytest ended with code -11 before it could report"),
    ],
)
def test_judged(code, text, passed, failed, red, why):
    """Green only where a test ran and all is well."""
    assert tiers.judged(code, text) == (passed, failed, red, why)


def test_optional_tiers_may_be_skipped_but_not_fail():
    """What few machines have is no reason for red; a failure there is."""
    assert not tiers.judged(0, report(1, reasons=["no GPU"]), optional=True).red
    assert tiers.judged(1, report(1, failures=1), optional=True).red
    assert tiers.judged(-11, None, optional=True).red


def test_every_test_file_has_a_tier():
    """A new folder of tests that no tier runs would never be red."""
    named = {ROOT / part for tier in tiers.TIERS.values() for part in tier.tests if part.startswith("tests")}
    files = [*(ROOT / "tests").rglob("test_*.py")]
    assert files and all(named & {file, *file.parents} for file in files)


def test_last_line_and_exit_code(tmp_path):
    """The whole program, on a tier that needs what an empty PATH has not."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "tiers.py", "web"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    *_, line, last = done.stdout.splitlines()
    assert line.startswith("web") and "RED" in line and "Node.js is not installed" in line
    assert last == "0 passed, 0 failed"
    unknown = subprocess.run(
        [sys.executable, ROOT / "tests" / "tiers.py", "webb"], capture_output=True, text=True
    )
    assert unknown.returncode == 2 and "got webb; allowed: unit" in unknown.stderr


def test_optional_tiers_that_are_asked_to_run():
    """Whoever asks for the browser must not get a green nothing."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "tiers.py", "--must-run", "browser"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "", "PYTHONNOUSERSITE": "1"},
    )
    assert done.returncode == 1 and "all" in done.stdout.splitlines()[-2]


def test_newest_triton_is_the_one_that_make_installs():
    """Else the tier would look for a folder that nothing makes."""
    assert f"NEWEST := {tiers.NEWEST}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")

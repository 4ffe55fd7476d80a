"""Runs the tiers of tests, each as a process of its own, and says what each one did.

    python tests/tiers.py                 all tiers; `make newest` comes first
    python tests/tiers.py unit web        these

A tier is red when something in it failed, when it ended before its report was written, and when it ran
nothing: a tier whose tests are all skipped must not look green. Optional tiers need what few machines have,
and may be skipped as a whole. The last line is "N passed, N failed", over the tests of all tiers.
"""

import argparse
import collections
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / ".mypy_cache" / "pack"  # a folder in which the repository has the name of a package
BROWSER = "tests/web/test_browser.py"
NEWEST = "3.9.0"  # of Triton; `make newest` installs it
NEWEST_FOLDER = ROOT / ".venv" / "triton" / NEWEST
WITH_NEWEST = (("PYTHONPATH", str(NEWEST_FOLDER)), ("EXPECTED_TRITON", NEWEST))


class Tier(NamedTuple):
    """One row of the table.

    Attributes:
        tests: pytest's arguments, empty for a tool that has no tests.
        commands: arguments of Python, for a tool.
        environment: variables that are set beside those of the caller.
        missing: a sentence on what the tier needs and this machine has not, or None.
        optional: may run nothing.
    """

    tests: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    missing: Callable[[], str | None] = lambda: None
    optional: bool = False


class Result(NamedTuple):
    """What a tier did."""

    passed: int = 0
    failed: int = 0
    red: bool = False
    why: str = ""


def no_triton() -> str | None:
    return (
        None
        if importlib.util.find_spec("triton")
        else "Triton is not installed, so no kernel is compiled or run"
    )


def no_newest() -> str | None:
    return None if (NEWEST_FOLDER / "ready").exists() else f"Triton {NEWEST} is not there: make newest"


def no_node() -> str | None:
    return (
        None if shutil.which("node") else "Node.js is not installed, so the page's JavaScript is not tested"
    )


TIERS = {
    "unit": Tier(("tests/unit", "tests/test_architecture.py")),
    "web": Tier(("tests/web", "--ignore", BROWSER), missing=no_node),
    "compile": Tier(("tests/compile",), missing=no_triton),
    # The interpreter has to be chosen before a kernel is imported.
    "interpret": Tier(("tests/interpret",), environment=(("TRITON_INTERPRET", "1"),), missing=no_triton),
    "newest compile": Tier(("tests/compile",), environment=WITH_NEWEST, missing=no_newest),
    "newest interpret": Tier(
        ("tests/interpret",), environment=(("TRITON_INTERPRET", "1"), *WITH_NEWEST), missing=no_newest
    ),
    "browser": Tier((BROWSER,), optional=True),
    "comfy": Tier(("tests/comfy",), optional=True),
    "gpu": Tier(("tests/gpu",), optional=True),
    "lint": Tier(commands=(("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", "."))),
    # The nodes import the library as `..fgattn`, so that they can be checked only inside of a package.
    "types": Tier(
        commands=(
            ("-m", "mypy", "fgattn", "benchmarks"),
            ("-m", "mypy", "--follow-imports=silent", "-p", "fgattn_pack.nodes"),
        ),
        environment=(("MYPYPATH", str(PACK)),),
    ),
}


def judged(code: int, report: str | None, optional: bool = False) -> Result:
    """What a pytest process did, from its exit code and its JUnit report as text, if it wrote one."""
    if report is None:
        return Result(red=True, why=f"pytest ended with code {code} before it could report")
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    tests, broken, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    passed = max(0, tests - broken - skipped)
    if broken:
        return Result(passed, broken, True, "tests failed")
    if passed and code:
        return Result(passed, 0, True, f"pytest ended with code {code}")
    if passed:
        return Result(passed)
    if not skipped:
        return Result(red=True, why=f"there are no tests, and pytest ended with code {code}")
    reasons = collections.Counter(skip.get("message") for suite in suites for skip in suite.iter("skipped"))
    why = f"all {skipped} tests are skipped, most of them because: {reasons.most_common(1)[0][0]}"
    return Result(red=not optional, why=why)


def run(name: str, record: str | None = None) -> Result:
    """Run one tier; a file gets a row of what it ran with."""
    tier = TIERS[name]
    if reason := tier.missing():
        return Result(red=not tier.optional, why=reason)
    environment = {**os.environ, **dict(tier.environment)}
    if not tier.tests:
        if "MYPYPATH" in environment:
            _named_as_package()
        codes = [
            subprocess.run([sys.executable, *c], cwd=ROOT, env=environment).returncode for c in tier.commands
        ]
        return Result(red=any(codes), why="see above" if any(codes) else "clean")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *tier.tests, f"--junitxml={report}"]
        if record:  # the newest Triton is another environment of the same tests
            command += ["--record", f"{name.removeprefix('newest ')}={record}"]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        text = report.read_text(encoding="utf-8") if report.exists() else None
    return judged(code, text, tier.optional)


def _named_as_package() -> None:
    """A link to the repository, whose own folder may have any name."""
    PACK.mkdir(parents=True, exist_ok=True)
    link = PACK / "fgattn_pack"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tiers", nargs="*", metavar="tier", help=f"of {', '.join(TIERS)}; all without one")
    parser.add_argument(
        "--must-run", action="store_true", help="optional tiers, too, are red if they run nothing"
    )
    parser.add_argument("--record", metavar="FILE", help="write what the tiers ran with, see tests/record.py")
    given = parser.parse_args()
    asked = given.tiers
    if unknown := set(asked) - set(TIERS):
        parser.error(f"tier: got {', '.join(sorted(unknown))}; allowed: {', '.join(TIERS)}")
    results, seconds = {}, {}
    for name in asked or TIERS:
        print(f"\n--- {name} ---", flush=True)
        start = time.monotonic()
        result = run(name, given.record and os.path.abspath(given.record))
        idle = given.must_run and not result.passed and TIERS[name].tests
        results[name] = result._replace(red=result.red or bool(idle))
        seconds[name] = time.monotonic() - start
    print()
    for name, result in results.items():
        tier = TIERS[name]
        state = "RED" if result.red else "green" if result.passed or not tier.tests else "not run"
        counts = f"{result.passed} passed, {result.failed} failed" if tier.tests else ""
        print(f"{name:10} {state:8} {seconds[name]:5.0f} s  {'; '.join(filter(None, (counts, result.why)))}")
    print(
        f"{sum(r.passed for r in results.values())} passed, {sum(r.failed for r in results.values())} failed"
    )
    return int(any(result.red for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

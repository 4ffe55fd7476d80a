"""What tests ran with: rows of tests/tested.json, which test runs write, and what the documents say of them.

    python tests/tiers.py --record tests/tested.json comfy     runs a tier and writes its row
    python tests/record.py [FILE ...]                          takes in rows of other machines, and renders

A row is one tier in one environment; a later run of the same replaces it. No row is typed by hand.
"""

import datetime
import hashlib
import importlib
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "tested.json"
ENVIRONMENT = ("tier", "comfyui", "torch", "triton", "python", "system", "gpu")
OUTCOME = ("passed", "failed", "skipped", "commit", "date")
CODE = ("__init__.py", "fgattn", "nodes", "web", "tests")
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # each has a line in the table, run or not
MARKED = re.compile(r"(<!-- tested: (\w+) -->\n).*?(<!-- end of tested -->)", re.DOTALL)


def row(tier: str, passed: int, failed: int, skipped: int) -> dict:
    """Of the process that ran the tier."""
    import torch

    comfyui = tier == "comfy" and runpy.run_path(os.environ["COMFYUI_PATH"] + "/comfyui_version.py")
    on_gpu = tier == "gpu" or (tier == "comfy" and os.environ.get("COMFYUI_DEVICE") == "cuda")
    return {
        "tier": tier,
        "comfyui": comfyui["__version__"] if comfyui else None,
        "torch": str(torch.__version__),
        "triton": importlib.import_module("triton").__version__
        if importlib.util.find_spec("triton")
        else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """Of this checkout's code; "code" and a digest where it has no history, or changes."""
    git = ("git", "-C", str(ROOT))
    try:
        changed = subprocess.check_output((*git, "status", "--porcelain", *CODE, ":!tests/tested.json"))
        if not changed:
            return subprocess.check_output((*git, "rev-parse", "--short=7", "HEAD"), text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"code {digest()}"


def digest() -> str:
    """Of the files that `commit` looks at."""
    paths = [path for name in CODE for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    read = sorted(path for path in paths if path.suffix in (".py", ".js", ".mjs"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:12]


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """All rows in order; of one environment the later one."""
    rows = {tuple(r[name] for name in ENVIRONMENT): r for r in old + new}
    return [rows[key] for key in sorted(rows, key=str)]


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def write(file: Path, new: list[dict]) -> None:
    lines = ",\n".join(json.dumps(r) for r in merged(read(file), new))
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def line(rows: list[dict]) -> str:
    """For people: versions of environments in which nothing failed."""
    failed = {tuple(r[name] for name in ENVIRONMENT[1:]) for r in rows if r["failed"]}
    good = [r for r in rows if tuple(r[name] for name in ENVIRONMENT[1:]) not in failed]

    def listed(name, digits):
        found = {r[name].split("+")[0] for r in good if r[name]}
        numbers = sorted({tuple(int(part) for part in v.split(".")[:digits]) for v in found})
        return ", ".join(".".join(map(str, n)) for n in numbers)

    versions = (
        ("ComfyUI", "comfyui", 3),
        ("Python", "python", 2),
        ("torch", "torch", 2),
        ("Triton", "triton", 2),
    )
    words = "; ".join(f"{word} {listed(name, digits)}" for word, name, digits in versions)
    devices = ", ".join(("CPU", *sorted({r["gpu"] for r in good if r["gpu"]})))
    return f"Tested with {words}; {devices}: [which with which](docs/compatibility.md#what-ran)."


def table(head: tuple[str, ...], cells: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join("| " + " | ".join(str(c) if c is not None else "" for c in row) + " |" for row in lines)


def rows_table(rows: list[dict]) -> str:
    """Every row."""
    head = (*ENVIRONMENT, *OUTCOME)
    return table(head, [tuple(r[name] for name in head) for r in rows])


def triton_table(rows: list[dict]) -> str:
    """Pairs of torch and Triton against the tiers that need Triton."""
    pairs = {
        (r["torch"], r["triton"])
        for r in rows
        if r["triton"] and r["tier"] in ("compile", "interpret", "gpu")
    }
    pairs |= {("", version) for version in TRITONS if version not in {triton for _, triton in pairs}}

    def cell(torch, triton, tier):
        found = [r for r in rows if (r["torch"], r["triton"], r["tier"]) == (torch, triton, tier)]
        text = (
            f"{r['passed']} passed, {r['failed']} failed" + (f", {r['gpu']}" if r["gpu"] else "")
            for r in found
        )
        return "; ".join(text) or "not run"

    tiers = ("compile", "interpret", "gpu")
    lines = [(torch, triton, *(cell(torch, triton, t) for t in tiers)) for torch, triton in sorted(pairs)]
    return table(
        ("torch", "Triton", "`tests/compile`", "`tests/interpret`", "`tests/gpu`"),
        sorted(lines, key=lambda cells: (cells[1], cells[0])),
    )


def rendered(text: str, rows: list[dict]) -> str:
    """A document with what is between its markers made anew."""
    make = {"line": line, "rows": rows_table, "triton": triton_table}
    return MARKED.sub(lambda m: m[1] + make[m[2]](rows) + "\n" + m[3], text)


def main() -> None:
    rows = merged(read(RECORD), [r for name in sys.argv[1:] for r in read(Path(name))])
    for r in rows:
        if r["commit"] == f"code {digest()}":  # it ran here before the commit, or on a copy without history
            r["commit"] = commit()
    files = (ROOT / "README.md", ROOT / "docs" / "compatibility.md")
    made = {file: rendered(file.read_text(encoding="utf-8"), rows) for file in files}  # all of it, or nothing
    write(RECORD, rows)
    for file, text in made.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

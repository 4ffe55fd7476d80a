"""Structure: what may import what, that backends stay behind their records, and the dictionary of words."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "fgattn"
DATA = (
    "cache",
    "call",
    "errors",
    "joining",
    "layout",
    "methods",
    "outcomes",
    "packing",
    "plan",
    "reference",
    "settings",
    "tensors",
)
# What a folder or file of the library may import: fgattn/README.md says the same in words.
MAY_IMPORT = {
    "backends/base": DATA,
    "backends/execute": (*DATA, "backends/base"),
    "backends/compile_log": (),
    "backends/shared": (*DATA, "backends/base"),
    "backends/pytorch": (*DATA, "backends/base"),
    "backends/triton": (*DATA, "backends/base", "backends/shared"),
    "backends/hopper": (*DATA, "backends/base", "backends/shared"),
    "backends/selftest": (*DATA, "backends/base", "backends/execute", "backends/pytorch"),
    "backends/registry": (*DATA, "backends"),
    "planning": (*DATA, "backends/execute", "backends/registry"),
    "attention": (*DATA, "backends/base", "backends/execute", "backends/registry", "planning"),
    "runs": (
        *DATA,
        "backends/base",
        "backends/compile_log",
        "backends/execute",
        "backends/registry",
        "planning",
    ),
    "show": (*DATA, "runs/reports", "runs/maps", "runs/plan_store"),
    "demo": (*DATA, "runs", "show"),
    "__main__": (*DATA, "", "backends/base", "backends/registry"),
    "__init__": (*DATA, "attention", "planning"),
}
# Words that had several meanings, or several words for one meaning: what is said instead.
GONE = {
    r"\brun_order\b|\bRUNS\b|\bTILE_RUNS\b|\bBLOCK_RUNS\b|\bruns? of 16\b": "query cell",
    r"\bgrouping\b|\bgrouped\((?!.*heads)": "joining; folded for reshaping",
    r"\bpooled_tail\b|\bpooled tail\b|\bpooled_hopper\b": "tail",
    r"\bcopy engine\b": "TMA",
    r"\bplan_call\b|\bgpu_kernel\b|\bhopper_missing\b": "Call, and one answer from the registry",
    r"\bscores_of\b|\bnumbers? of scores\b|\bscores computed\b": "pairs",
}
BACKENDS = {"hopper", "triton", "torch", "reference"}
# ComfyUI calls this one: its parameters are not ours to choose.
CONTRACTS = {("nodes/attention_call.py", "__init__")}


def name_of(path: Path) -> str:
    """Of a module, as in MAY_IMPORT: "runs/engine", "" for the package itself."""
    name = path.relative_to(LIBRARY).with_suffix("").as_posix()
    return name.removesuffix("__init__").removesuffix("/") if name != "__init__" else "__init__"


MODULES = {name_of(path): path for path in sorted(LIBRARY.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Modules of the library that a module imports, wherever in it."""
    path = MODULES[name]
    package = path.parent.relative_to(LIBRARY).as_posix().split("/")
    package = [] if package == ["."] else package
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            whole = "/".join([*base, *(node.module or "").split(".")]).strip("/")
            for alias in node.names:
                inner = f"{whole}/{alias.name}".strip("/")
                found.add(inner if inner in MODULES else whole)
    return found - {name}


def folder_of(name: str) -> str:
    """The entry of MAY_IMPORT that a module belongs to, "" for data."""
    return next((entry for entry in MAY_IMPORT if name == entry or name.startswith(f"{entry}/")), "")


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "fgattn")
def test_imports_go_one_way(name):
    """A newcomer can read a folder without those above it, and a new backend touches its own folder."""
    entry = folder_of(name)
    allowed = (*MAY_IMPORT[entry], entry) if entry else DATA
    wrong = {
        other
        for other in imported(name)
        if not any(other == a or (a and other.startswith(f"{a}/")) for a in allowed)
    }
    if name == "backends":
        wrong = imported(name)
    assert not wrong


def test_no_circle():
    """Imports inside functions count: they only hide a circle."""
    left = {name: imported(name) & MODULES.keys() for name in MODULES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_a_circle_is_seen(monkeypatch):
    """The rule above can fail."""
    monkeypatch.setitem(globals(), "imported", {"a": {"b"}, "b": {"a"}, "c": set()}.__getitem__)
    monkeypatch.setitem(globals(), "MODULES", dict.fromkeys("abc"))
    with pytest.raises(AssertionError):
        test_no_circle()


def docstrings(tree: ast.AST) -> set[int]:
    """ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


def names_backend(source: str) -> list[str]:
    """What in a piece of code says the name of a backend, other than its docstrings."""
    tree = ast.parse(source)
    texts = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            found += [node.value] * bool(node.value in BACKENDS - {"torch"} or "hopper" in node.value.lower())
        if isinstance(node, (ast.Name, ast.Attribute, ast.arg, ast.keyword)):
            word = getattr(node, "id", getattr(node, "attr", getattr(node, "arg", ""))) or ""
            found += [word] * bool("hopper" in word.lower())
    return found


@pytest.mark.parametrize(
    "path",
    [p for d in ("fgattn", "nodes") for p in sorted((ROOT / d).rglob("*.py")) if "backends" not in p.parts],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_backends_are_named_in_their_folder_only(path):
    """Who compares names decides what a record should decide. `doctor` prints Triton's version."""
    found = names_backend(path.read_text())
    assert found == (["triton"] * 2 if path == LIBRARY / "__main__.py" else [])


def test_a_named_backend_is_seen():
    """The rule above can fail."""
    assert names_backend("if impl == 'hopper': pass") and names_backend("launch(hopper=True)")
    assert not names_backend('def f():\n    """The Hopper kernel."""')


def test_lines_of_the_page_fit():
    """fgattn/README.md is read beside the code, in an editor."""
    lines = (LIBRARY / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []


def positional(path: Path):
    """(name, number of positional parameters) of every function that is no kernel."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            yield node.name, len(names)


@pytest.mark.parametrize(
    "path",
    [p for d in ("fgattn", "nodes", "benchmarks") for p in sorted((ROOT / d).rglob("*.py"))],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_no_trains_of_arguments(path):
    """More than six values in a row are told apart by counting: they belong into a record."""
    name = path.relative_to(ROOT).as_posix()
    long = [f"{f}: {n}" for f, n in positional(path) if n > 6 and (name, f) not in CONTRACTS]
    assert not long


@pytest.mark.parametrize("pattern", GONE)
def test_words_that_are_gone(pattern):
    """One meaning a word: fgattn/README.md is the dictionary."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("fgattn", "nodes")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"say {GONE[pattern]}"

"""The archive that the registry gets: what must be in it, and what must not."""

import ast
import subprocess
from pathlib import Path

import pathspec
import pytest

# The name under which comfy-cli asks for the rules; newer releases of pathspec prefer another.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
ROOT = Path(__file__).parents[2]


def tracked():
    """Files of the repository; new ones count before they are committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


def ignored():
    """The rules of .comfyignore, read as comfy-cli reads them: Git's rules for patterns."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return pathspec.PathSpec.from_lines("gitwildmatch", lines)


@pytest.fixture(scope="module")
def shipped():
    """Names of the files in the archive."""
    ignore = ignored()
    return {name for name in tracked() if not ignore.match_file(name)}


def imported(name, seen):
    """Adds a file and what it imports relatively, at any depth, to `seen`."""
    if name in seen:
        return
    seen.add(name)
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = (ROOT / name).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
            for path in (module, *(module / alias.name for alias in node.names)):
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.is_file():
                        imported(file.relative_to(ROOT).as_posix(), seen)
    for parent in (ROOT / name).parents:
        if parent == ROOT:
            break
        if (init := parent / "__init__.py").is_file():
            imported(init.relative_to(ROOT).as_posix(), seen)


@pytest.fixture(scope="module")
def code():
    """Python files that ComfyUI loads with the pack."""
    seen: set[str] = set()
    imported("__init__.py", seen)
    for path in (ROOT / "nodes").rglob("*.py"):
        imported(path.relative_to(ROOT).as_posix(), seen)
    return seen


def test_code_that_the_nodes_import(shipped, code):
    """Also what is imported only inside of functions: the kernels."""
    assert {"nodes/patch.py", "fgattn/__init__.py", "fgattn/runs/engine.py"} <= code
    assert [name for name in code if name.startswith("fgattn/backends/hopper/")]
    assert sorted(code - shipped) == []


@pytest.mark.parametrize("start", ["web/docs/", "web/js/", "locales/", "nodes/", "fgattn/backends/"])
def test_folders_that_ship_whole(shipped, start):
    """Help pages, the page's modules, texts, nodes, kernels."""
    files = {name for name in tracked() if name.startswith(start)}
    assert files and sorted(files - shipped) == []


def test_single_files_that_ship(shipped):
    """Templates with their pictures, and what describes the pack."""
    names = {
        name
        for name in tracked()
        if name.startswith("example_workflows/") and name.endswith((".json", ".jpg"))
    }
    assert len(names) >= 2
    names |= {"LICENSE", "README.md", "fgattn/py.typed", "pyproject.toml", "requirements.txt"}
    assert sorted(names - shipped) == []


@pytest.mark.parametrize(
    "start",
    [
        ".", "CONTRIBUTING.md", "Makefile", "benchmarks/", "docs/",
        "example_workflows/make.py", "fgattn/demo/", "requirements-dev.txt", "tests/",
    ],
)  # fmt: skip
def test_tools_do_not_ship(shipped, start):
    """Tests and tools are of no use to who renders, and the registry's scanner flags what they do."""
    assert sorted(name for name in shipped if name.startswith(start)) == []


def test_size(shipped):
    """An archive of text and a few pictures."""
    assert sum((ROOT / name).stat().st_size for name in shipped) < 4 << 20

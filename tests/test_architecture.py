"""Rules of the code base that no single module can keep by itself."""

import ast
import inspect
import re
import subprocess
import typing
from pathlib import Path

import fgattn
import pytest
import torch
from fgattn.outcomes import Outcome
from fgattn.runs.reports import Kind

ROOT = Path(__file__).parents[1]
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
HOT = (
    "backends/hopper/attend",
    "backends/hopper/lister",
    "backends/hopper/tail",
    "backends/pytorch/attend",
    "backends/pytorch/scoring",
    "backends/pytorch/select",
    "backends/pytorch/tail",
    "backends/shared/join",
    "backends/shared/key_tables",
    "backends/shared/launch",
    "backends/shared/lists",
    "backends/shared/refine",
    "backends/shared/select",
    "backends/shared/summarise",
    "backends/triton/attend",
    "backends/shared/tail",
    "joining",
    "methods/__init__",
    "methods/common",
    "methods/hierarchical",
    "methods/radial",
    "methods/sol",
    "methods/top_k",
    "plan",
    "runs/estimate",
    "tensors",
)
BANNED_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "__import__": "hides what is loaded",
    "os.system": "starts programs",
    "os.popen": "starts programs",
    "os.getenv": "settings come from nodes, not from the environment",
    "torch.load": "unpickles",
    "torch.cuda.synchronize": "stops the pipeline",
    "torch.cuda.empty_cache": "belongs to ComfyUI",
    "torch.manual_seed": "changes the sampler's random numbers",
    "tl.make_block_ptr": "deprecated",
    "tl.advance": "deprecated",
    "logging.basicConfig": "belongs to ComfyUI",
    "torch.cuda.set_device": "belongs to ComfyUI",
}
BANNED_IMPORTS = {
    "ctypes",
    "http",
    "marshal",
    "pickle",
    "requests",
    "shelve",
    "socket",
    "subprocess",
    "urllib",
}
SYNCHRONISES = {"item", "tolist", "cpu", "numpy", "nonzero"}


def shipped():
    """Python files that run in a user's ComfyUI."""
    return [ROOT / "__init__.py", *(p for d in ("nodes", "fgattn") for p in sorted((ROOT / d).rglob("*.py")))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def is_program(path):
    """Started by a person in a terminal: may print."""
    return path.name == "__main__.py" or "fgattn/demo" in path.as_posix()


def imports(path):
    """(level, module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def dotted(node):
    """a.b.c of an expression, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return None


every_file = pytest.mark.parametrize("path", shipped(), ids=name_of)


@every_file
def test_only_nodes_import_comfyui(path):
    """The library runs without ComfyUI, and a change over there touches one folder here."""
    if path.parent != ROOT / "nodes":
        assert not {m.partition(".")[0] for level, m in imports(path) if not level} & COMFYUI


@every_file
def test_own_code_is_imported_relatively(path):
    """ComfyUI loads the pack under a name of its own; `nodes` is a module of ComfyUI."""
    absolute = {m.partition(".")[0] for level, m in imports(path) if not level}
    assert not absolute & {"fgattn", "nodes", "fgattn_pack"}


@every_file
def test_library_does_not_import_nodes(path):
    """nodes -> fgattn, never back."""
    if "fgattn" in path.relative_to(ROOT).parts:
        depth = len(path.relative_to(ROOT / "fgattn").parts)
        assert all(level <= depth for level, _ in imports(path))


def texts_of(source):
    """String literals of a piece of code."""
    return {
        n.value
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


@every_file
def test_texts_of_outcomes_stand_in_one_place(path):
    """What is compared, counted and looked up is the outcome, its text is for people. Steps have kinds."""
    texts = {outcome.value for outcome in Outcome} - {*typing.get_args(Kind)}
    assert len(texts) == len(Outcome) - 1
    assert path.name == "outcomes.py" or not texts & texts_of(path.read_text())


@pytest.mark.parametrize("path", [*shipped(), *sorted((ROOT / "web" / "js").iterdir())], ids=name_of)
def test_the_map_node_has_one_name(path):
    """Saved workflows know it by the id of its first days; nothing else has that name."""
    assert re.findall(r"\w*inspect\w*", path.read_text(encoding="utf-8"), re.I) == (
        ["FGAttnInspect"] if name_of(path) == "nodes/maps.py" else []
    )


def test_outcomes_import_nothing_of_the_package():
    """Every part may name them."""
    assert not [module for level, module in imports(ROOT / "fgattn" / "outcomes.py") if level]


@pytest.mark.parametrize(
    "path", [ROOT / "web" / "js" / name for name in ("view.js", "panel.js", "store.js")], ids=name_of
)
def test_the_page_shows_texts_and_asks_for_fields(path):
    """No sentence is taken apart, and no outcome is known by its words."""
    source = path.read_text(encoding="utf-8")
    assert '.split(", ")' not in source
    assert not [o for o in Outcome if f'"{o.value}"' in source and o is not Outcome.SPARSE]


def violations(source):
    """Banned calls, attributes and imports in a piece of code."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := dotted(node.func)) in BANNED_CALLS:
            yield f"{called} {BANNED_CALLS[called]}"
        if isinstance(node, ast.Attribute) and dotted(node) == "os.environ":
            yield "os.environ: settings come from nodes, not from the environment"
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in BANNED_IMPORTS)
        if isinstance(node, ast.ImportFrom) and not node.level:
            if node.module.partition(".")[0] in BANNED_IMPORTS:
                yield node.module
            whole = {f"{node.module}.{a.name}" for a in node.names}
            yield from whole & {*BANNED_CALLS, "os.environ"}
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield "bare except"
        if isinstance(node, ast.Assert):
            yield "assert: python -O drops it"


def prints(source):
    return any(isinstance(n, ast.Call) and dotted(n.func) == "print" for n in ast.walk(ast.parse(source)))


@every_file
def test_banned_calls(path):
    """What the registry's scanner flags, what stalls the GPU, and what belongs to others."""
    assert not list(violations(path.read_text()))
    assert is_program(path) or not prints(path.read_text()), "log instead of printing"


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import subprocess",
        "from subprocess import run",
        "import urllib.request",
        "os.environ['X']",
        "os.getenv('X')",
        "from os import environ",
        "torch.load('x')",
        "torch.cuda.synchronize()",
        "def f():\n    import pickle",
        "try:\n    pass\nexcept:\n    pass",
        "assert x",
        "tl.make_block_ptr(x)",
    ],
)
def test_banned_calls_are_seen(source):
    """The rule above can fail."""
    assert list(violations(source))


@pytest.mark.parametrize("name", HOT)
def test_hot_path_does_not_wait_for_the_gpu(name):
    """One read of a device value stalls every attention call; the fallback gathers by lists of any length."""
    allowed = {("backends/pytorch/attend", "nonzero")}
    tree = ast.parse((ROOT / "fgattn" / f"{name}.py").read_text())
    found = {
        (name, n.func.attr)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in SYNCHRONISES
    }
    assert found <= allowed


@every_file
def test_files_stay_small(path):
    """What is too long to read at once is split."""
    limit = 320 if "backends" in path.parts else 220 if path.parent == ROOT / "nodes" else 350
    assert len(path.read_text().splitlines()) <= limit


def test_version_in_one_place():
    """The registry reads pyproject, users read fgattn.__version__."""
    text = (ROOT / "pyproject.toml").read_text()
    project = re.search(r"^\[project\]$(.*?)(?=^\[|\Z)", text, re.M | re.S)
    if project:
        version = re.search(r'^version\s*=\s*"(.+?)"', project[1], re.M)
        dynamic = re.search(r"^dynamic\s*=.*version", project[1], re.M)
        assert dynamic or version[1] == fgattn.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fgattn.__version__)
    named = re.compile(r"^(__)?version(__)?\s*=", re.M | re.I)
    assert [name_of(p) for p in shipped() if named.search(p.read_text())] == ["fgattn/__init__.py"]


def test_torch_is_no_dependency():
    """pip would replace the torch that ComfyUI runs on by another build."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies\s*=\s*\[(.*?)\]", text, re.M | re.S)
    assert not listed or not re.search(r"""["']torch\b""", listed[1])


def test_requirements_are_one_list():
    """Managers read requirements.txt of what is cloned, the registry pyproject."""
    listed = re.search(r"^dependencies\s*=\s*\[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert re.findall(r'"(.+?)"', listed[1]) == (ROOT / "requirements.txt").read_text().splitlines()


def test_one_version_of_ruff():
    """What is formatted on commit must pass in continuous integration."""
    hook = re.search(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.M)
    assert hook[1] == pinned[1]


def tracked():
    """Text files of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield name, data.decode()


def test_no_paths_of_a_machine():
    """A path of one developer's machine helps nobody else."""
    roots = ("home", "root", "work", "Users", "mnt", "workspace")
    path = re.compile(rf"(?<![\w.<])/(?:{'|'.join(roots)})/\w")
    assert [name for name, text in tracked() if path.search(text)] == []
    assert path.search("/ho" + "me/me") and path.search("'/wo" + "rk/main'")
    assert not path.search("net/wo" + "rk/x")


def test_public_names():
    """Names that users import; each one has a docstring."""
    assert sorted(fgattn.__all__) == [
        "InvalidArgument",
        "Settings",
        "SparsePlan",
        "TokenLayout",
        "Unsupported",
        "attend",
        "build_plan",
        "plan_from_mask",
        "sparse_attention",
    ]
    assert all(getattr(fgattn, name).__doc__ for name in fgattn.__all__)


@every_file
def test_every_module_says_what_it_is(path):
    """A reader's first question."""
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_pack_root_imports_nothing(pack_root):
    """pytest and linters import the root; ComfyUI must be needed only when it asks for the nodes."""
    assert pack_root.WEB_DIRECTORY == "./web" and (ROOT / "web").is_dir()
    assert inspect.iscoroutinefunction(pack_root.comfy_entrypoint)
    top = ast.parse((ROOT / "__init__.py").read_text()).body
    assert not [n for n in top if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_unwritten_memory_is_poisoned():
    """The fixture behind every test: what our code leaves unwritten must show."""
    scope = {"torch": torch, "__name__": "fgattn.backends.x"}
    exec(
        "floats = torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)\n"
        "ints = torch.empty(3, dtype=torch.int32)",
        scope,
    )
    assert all(x.isnan().all() for x in scope["floats"])
    assert (scope["ints"] == 2**31 - 1).all()

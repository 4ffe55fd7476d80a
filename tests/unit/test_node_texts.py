"""Texts of the nodes: locales/<language>/nodeDefs.json, which ComfyUI merges, and the help pages."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "tests" / "web" / "object_info.json").read_text(encoding="utf-8"))
NODES = {name: said for name, said in RECORD.items() if name.startswith("FGAttn")}
EN, ZH = (
    json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for language in ("en", "zh")
)


def leaves(value, path=()):
    """(path, text) of every text."""
    if isinstance(value, str):
        yield path, value
    else:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))


def in_source():
    """Node -> its input -> tooltip, read from the schemas without ComfyUI."""
    for file in (ROOT / "nodes").glob("*.py"):
        for schema in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(schema, ast.Call) and ast.unparse(schema.func) == "io.Schema"):
                continue
            given = {k.arg: k.value for k in schema.keywords}
            yield (
                given["node_id"].value,
                {
                    call.args[0].value: next(k.value.value for k in call.keywords if k.arg == "tooltip")
                    for call in given["inputs"].elts
                },
            )


def test_the_record_of_the_schemas_is_the_source():
    """tests/comfy writes it; whoever changes a tooltip without a ComfyUI is told here."""
    recorded = {
        name: {
            i: spec[1]["tooltip"]
            for part in ("required", "optional")
            for i, spec in said["input"].get(part, {}).items()
        }
        for name, said in NODES.items()
    }
    assert recorded == dict(in_source()), "run tests/comfy/test_object_info.py"


@pytest.mark.parametrize("name", NODES)
def test_english_is_the_schema(name):
    """Every input and output, with name and tooltip, and nothing else."""
    said = NODES[name]
    inputs = {
        i: {"name": i, "tooltip": spec[1]["tooltip"]}
        for part in ("required", "optional")
        for i, spec in said["input"].get(part, {}).items()
    }
    outputs = {
        str(i): {"name": output, "tooltip": tip}
        for i, (output, tip) in enumerate(zip(said["output_name"], said["output_tooltips"], strict=True))
    }
    assert EN[name] == {
        "display_name": said["display_name"],
        "description": said["description"],
        "inputs": inputs,
        "outputs": outputs,
    }
    assert set(EN) == set(NODES)


def test_chinese_has_every_text_with_the_same_numbers():
    """A number that changes in one language changes in the other."""
    english, chinese = dict(leaves(EN)), dict(leaves(ZH))
    assert list(english) == list(chinese)
    for path, text in chinese.items():
        if path[-1] in ("tooltip", "description"):
            assert re.search("[\u4e00-\u9fff]", text), path
            ours, theirs = (set(re.findall(r"\d+(?:\.\d+)?", t)) for t in (text, english[path]))
            assert ours == theirs, path


def test_nothing_that_the_page_would_read_as_code():
    """vue-i18n takes these signs for links, values and plurals."""
    for path, text in [*leaves(EN), *leaves(ZH)]:
        assert not set(text) & set("@{}|"), path


@pytest.mark.parametrize("name", NODES)
def test_help_page(name):
    """It explains every widget; its pictures are there."""
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert pictures and all((ROOT / "web" / "docs" / p).stat().st_size < 300_000 for p in pictures)
    assert [i for i in EN[name]["inputs"] if not re.search(rf"\b{i}\b", page)] == []


def test_pictures_of_the_readme():
    """Small, and all there."""
    pictures = re.findall(r"!\[.+?\]\((\S+?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(pictures) > 2 and all((ROOT / p).stat().st_size < 300_000 for p in pictures)

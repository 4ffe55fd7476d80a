"""The page's modules under Node, and the message between server and page checked from both sides."""

import dataclasses
import json
import re
import shutil
import subprocess
import types
import typing
from pathlib import Path

import pytest
from fgattn.runs.reports import BlockReport, CellReport, RunReport, StepReport
from fgattn.show import snapshot
from fgattn.show.text import describe, percent
from makers import CHOSEN, by_reason

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "web" / "js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(not NODE, reason="no node: the page's JavaScript is not tested")


def node(*args, given=None):
    return subprocess.run([NODE, *map(str, args)], input=given, capture_output=True, text=True, timeout=120)


def shape_of(kind):
    """A type of snapshot.py in the words of schema.js."""
    if dataclasses.is_dataclass(kind):
        return {name: shape_of(t) for name, t in typing.get_type_hints(kind).items()}
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return {"list": shape_of(typing.get_args(kind)[0])}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return shape_of(typing.get_args(kind)[0]) + "?"
    return {int: "int", float: "number", str: "string", bool: "bool"}[kind]


def fits(value, shape):
    """Whether a value has a shape."""
    if isinstance(shape, list):
        return value in shape
    if isinstance(shape, dict) and "list" in shape:
        return all(fits(item, shape["list"]) for item in value)
    if isinstance(shape, dict):
        return value.keys() == shape.keys() and all(fits(value[name], shape[name]) for name in shape)
    if value is None:
        return shape.endswith("?")
    kinds = {"int": int, "number": (int, float), "string": str, "bool": bool}
    return isinstance(value, kinds[shape.rstrip("?")]) and isinstance(value, bool) == (shape == "bool")


def reports():
    empty = RunReport(CHOSEN, 0, "torch", "cpu", 0.0, (), (), {}, None, None, None, None, None, None)
    full = dataclasses.replace(
        empty,
        tokens=9,
        total=12.34,
        steps=(
            StepReport(0, 9.0, 5.0, 0.0, 0, 4, True),
            StepReport(1, 8.0, 3.0, 1.0, 4, 0, estimated_error=0.0123),
        ),
        blocks=(BlockReport(-1, 0.5, 0.6), BlockReport(2, 1 / 3, 0.6, 0.0123)),
        cells=(CellReport(1, -1, 0.5), CellReport(1, 2, 1 / 3)),
        estimated_error=0.0123,
        calls=by_reason(sparse=4, warm_up=4),
        dense_call=1.25,
        sparse_call=1.0,
        density=0.4,
        executed_density=0.6,
        scheduled=4,
        sliders=((0, 1.0, 2), (1, 0.7, 0)),
    )
    return [empty, full, dataclasses.replace(full, failure='RuntimeError: \u00e9 \u6c49 \n "quoted"')]


def test_the_page_has_the_same_definition():
    """One definition, in snapshot.py; the page's copy says the same, in the same order."""
    source = (WEB / "schema.js").read_text()
    written = json.loads(re.search(r"SCHEMA = (\{.*?\n\});", source, re.S)[1])
    wanted = shape_of(snapshot.Snapshot)
    assert written == wanted, f"schema.js must say: {json.dumps(wanted)}"
    assert list(written) == list(wanted)
    assert f"VERSION = {snapshot.SCHEMA_VERSION};" in source


@needs_node
def test_the_page_understands_the_server():
    """Python-made snapshots, through JSON as ComfyUI sends them; and broken ones are seen."""
    made = [snapshot.snapshot(r, "3", "a", s) for r in reports() for s in typing.get_args(snapshot.State)]
    broken = [{**made[0], "step": None}, {**made[0], "version": snapshot.SCHEMA_VERSION + 1}]
    answer = node(HERE / "judge.mjs", given=json.dumps([*made, *broken]))
    assert not answer.stderr
    judged = json.loads(answer.stdout)
    assert judged[:-2] == [None] * len(made) and all(judged[-2:])


@needs_node
def test_the_server_would_send_what_the_page_is_tested_with():
    """JavaScript-made samples have the definition's shape."""
    samples = json.loads(node(HERE / "sample.mjs").stdout)
    shape = shape_of(snapshot.Snapshot)
    assert len(samples) == 3 and all(fits(sample, shape) for sample in samples)
    assert not fits({**samples[0], "total": "1"}, shape) and not fits({**samples[0], "x": 1}, shape)


@needs_node
def test_page_and_server_write_the_same_words():
    """Shares, with halves, powers of ten and what is far below any use; and settings."""
    shares = [
        0,
        1,
        1e-9,
        9.9e-5,
        1e-4,
        1.05e-4,
        0.00995,
        0.0999,
        0.125,
        0.145,
        0.995,
        0.9949,
        2.345,
        1e6,
        *(i / 1000 for i in range(999)),
        *(i / 512 for i in range(512)),
        *(1.3**-i for i in range(40)),
    ]
    moved = [
        {"moved_threshold": 0.0},
        {"moved_warmup_steps": 0},
        {},
        {"moved_threshold": 1.35, "moved_warmup_steps": 3, "reuse_steps": 4},
    ]
    changes = [
        {},
        {"method": "top_k", "strength": 0.3, "tail": False},
        {"strength": 1 / 3, "reuse_steps": 2},
        *({"moved": True, **change} for change in moved),
    ]
    settings = [dataclasses.replace(CHOSEN, **change) for change in changes]
    given = {"percent": shares, "settings": [dataclasses.asdict(one) for one in settings]}
    answer = node(HERE / "words.mjs", given=json.dumps(given))
    assert not answer.stderr
    assert json.loads(answer.stdout) == {
        "percent": [percent(share) for share in shares],
        "settings": [describe(one) for one in settings],
    }


@needs_node
@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.mjs")), ids=lambda p: p.stem)
def test_modules(path):
    """Reducer, view and graph walk, without a page."""
    result = node("--test", path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^# pass [1-9]", result.stdout, re.M) or re.search(r"pass [1-9]", result.stdout)


def test_only_one_file_knows_the_page():
    """ComfyUI imports every .js file as an extension: the others have no side effect and import no page."""
    assert [p.name for p in sorted(WEB.glob("*.js")) if "/scripts/" in p.read_text()] == ["fgattn.js"]
    for path in WEB.glob("*.js"):
        source = path.read_text()
        assert "innerHTML" not in source, path.name
        if path.name != "fgattn.js":
            statements = re.findall(r"^(\w+)", source, re.M)
            assert set(statements) <= {"import", "export", "const", "let", "function"}, path.name

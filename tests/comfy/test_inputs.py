"""Inputs of the node that cannot be: refused by ComfyUI's own check where it can, else when the node runs."""

import asyncio
import math
import sys

import pytest

GIVEN = {"threshold": 1.0, "tile_queries": "128", "tile_keys": "16", "warmup_steps": 2, "method": "threshold"}


@pytest.fixture
def queued(pack, monkeypatch):
    """What ComfyUI's check says of the node with some inputs: (input, error) of all that it reports."""
    import execution

    import nodes

    class Loader:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Loader", Loader)
    monkeypatch.setitem(
        nodes.NODE_CLASS_MAPPINGS, "FGAttnPatch", sys.modules["fgattn_pack.nodes"].FGAttnPatch
    )

    def ask(**inputs):
        optional = {"dense_blocks": "", "method_parameter": 0.0, "tail": True}
        node = {"model": ["2", 0], **GIVEN, **optional, **inputs}
        prompt = {
            "1": {"class_type": "FGAttnPatch", "inputs": node},
            "2": {"class_type": "Loader", "inputs": {}},
        }
        _, errors, _ = asyncio.run(execution.validate_inputs("x", prompt, "1", {}))
        return [(error["extra_info"]["input_name"], error["details"]) for error in errors]

    return ask


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", math.nan),
        ("threshold", math.inf),
        ("threshold", 10**400),
        ("threshold", "much"),
        ("threshold", -0.1),
        ("method_parameter", math.nan),
        ("method_parameter", 9.0),
        ("warmup_steps", 10**9),
        ("warmup_steps", math.nan),
        ("tile_keys", "3"),
        ("method", "topk"),
        ("dense_blocks", "1,,2"),
        ("dense_blocks", {"__value__": ["0"]}),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_wrong_input_is_reported_once_under_its_name(queued, name, value):
    """Before anything is computed; a NaN would be kept in the page's list of jobs, too."""
    assert [reported for reported, _ in queued(**{name: value})] == [name]


def test_every_wrong_input_is_reported(queued):
    wrong = {"threshold": math.nan, "dense_blocks": "x", "warmup_steps": -1}
    assert sorted(name for name, _ in queued(**wrong)) == sorted(wrong)


@pytest.mark.parametrize(
    "inputs", [{}, {"threshold": 8.0}, {"method_parameter": 0.3}, {"threshold": 0}], ids=str
)
def test_right_inputs_are_queued(queued, inputs):
    """A parameter that the method does not use is no reason to stop."""
    assert queued(**inputs) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", math.nan),
        ("threshold", True),
        ("tile_queries", "64.9"),
        ("tile_queries", 2.7),
        ("tile_keys", 2.7),
        ("tile_keys", True),
        ("tile_keys", "²"),
        ("warmup_steps", 2.7),
        ("warmup_steps", 10**400),
        ("tail", "maybe"),
        ("estimate_error", "maybe"),
        ("live", "maybe"),
        ("dense_blocks", ["0"]),
        ("dense_blocks", None),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_comes_through_a_link_is_refused_by_name(patched, name, value):
    """ComfyUI checks no values of links; the library does, before the model is touched."""
    errors = sys.modules["fgattn_pack.fgattn.errors"]
    with pytest.raises(errors.InvalidArgument, match=rf"^{name}: got "):
        patched(None, **{name: value})


@pytest.mark.parametrize(
    ("method", "parameter", "says"),
    [
        ("top_k", 1.5, "up to 1 with top_k"),
        ("sol", 9.0, "up to 8 with sol"),
        ("radial", math.nan, "up to 8 with radial"),
        ("topk", 0.0, "threshold, top_k, sol, hierarchical, radial"),
    ],
)
def test_a_strength_that_the_method_does_not_take(patched, method, parameter, says):
    """It depends on two inputs: refused when the node runs."""
    errors = sys.modules["fgattn_pack.fgattn.errors"]
    with pytest.raises(errors.InvalidArgument, match=says):
        patched(None, method=method, method_parameter=parameter)


def test_a_strength_that_the_method_does_not_use(wan, patched):
    assert patched(wan, method_parameter=0.3)

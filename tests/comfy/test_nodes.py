"""Schemas, queue-time checks and the timing node."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nodes(pack):
    return sys.modules["fgattn_pack.nodes"]


@pytest.fixture
def timing(nodes, tmp_path, monkeypatch):
    """Run the timing node as the graph does."""
    import folder_paths
    from comfy_api.latest import io

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    clone = nodes.FGAttnTiming.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "2"}})
    return clone.execute


def test_entrypoint_lists_the_nodes(pack):
    """ComfyUI finds the nodes through comfy_entrypoint."""
    extension = asyncio.run(pack.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    assert [n.GET_SCHEMA().node_id for n in listed] == ["FGAttnPatch", "FGAttnTiming", "FGAttnInspect"]
    assert (ROOT / pack.WEB_DIRECTORY / "docs").is_dir()


def test_every_input_and_output_has_a_tooltip(nodes):
    """Tooltips are the documentation on the graph."""
    for node in (nodes.FGAttnPatch, nodes.FGAttnTiming, nodes.FGAttnMap):
        schema = node.GET_SCHEMA()
        assert all(i.tooltip for i in [*schema.inputs, *schema.outputs])
        assert (ROOT / "web" / "docs" / f"{schema.node_id}.md").is_file()


def test_input_order_is_permanent(nodes):
    """Saved workflows store values by position: append, never reorder."""
    assert [i.id for i in nodes.FGAttnPatch.GET_SCHEMA().inputs] == [
        "model",
        "threshold",
        "tile_queries",
        "tile_keys",
        "warmup_steps",
        "min_tokens",
        "dense_blocks",
        "final_dense_steps",
        "tail",
        "order",
        "method",
        "method_parameter",
        "reuse_steps",
        "reuse_memory_mb",
        "estimate_error",
        "live",
    ]
    assert [i.id for i in nodes.FGAttnTiming.GET_SCHEMA().inputs] == ["model", "latent", "model_2"]
    assert [i.id for i in nodes.FGAttnMap.GET_SCHEMA().inputs] == [
        "model",
        "latent",
        "block",
        "head",
        "step",
        "frame",
        "row",
        "column",
    ]


def test_defaults_are_the_library_defaults(nodes):
    """What the node starts with is what Settings and Policy start with."""
    settings = sys.modules["fgattn_pack.fgattn.settings"]
    for given in nodes.FGAttnPatch.GET_SCHEMA().inputs[1:-1]:
        holder = settings.Settings() if hasattr(settings.Settings(), given.id) else settings.Policy()
        expected = getattr(holder, given.id)
        default = settings.parse_blocks(given.default) if given.id == "dense_blocks" else given.default
        assert str(default) == str(expected), given.id
    assert nodes.FGAttnPatch.GET_SCHEMA().inputs[-1].default is False


@pytest.mark.parametrize("text", ["x", "1,,2", "3-1", "1 2", "-4", "1.5"])
def test_wrong_blocks_are_refused_when_queued(nodes, text):
    """The graph does not start, and the message says what to write."""
    message = nodes.FGAttnPatch.validate_inputs(dense_blocks=text)
    assert isinstance(message, str) and "0, 1, 38-39" in message


def test_right_blocks_are_accepted(nodes):
    assert nodes.FGAttnPatch.validate_inputs(dense_blocks=" 0, 1, 38 - 39 ") is True
    assert nodes.FGAttnPatch.validate_inputs(dense_blocks="") is True


@pytest.mark.parametrize("method", ["top_k", "sol", "hierarchical", "radial"])
def test_every_method_samples(wan, sample, patched, timing, method):
    """In the graph, in its own order, and named in the report."""
    model = patched(wan, method=method, order="hilbert" if method == "hierarchical" else "cells")
    sample(model)
    text = timing(model=model, latent={}).args[1]
    assert text.startswith("sparse: ") and f"settings: {method} " in text
    assert "\nerror: " not in text and "est. error" in text


def test_timing_reports_a_run(wan, sample, patched, timing):
    """Text and chart of a real run; the latent is the object that came in."""
    model, latent = patched(wan, warmup_steps=2), {"samples": torch.zeros(1)}
    sample(model)
    result = timing(model=model, latent=latent)
    assert result.args[0] is latent
    assert result.args[1].startswith("sparse: ") and "warm-up step" in result.args[1]
    picture = result.args[2]
    assert picture.ndim == 4 and picture.shape[3] == 3 and picture.std() > 0.02
    assert result.ui["text"] == (result.args[1],) and len(result.ui["images"]) == 1
    json.dumps(result.ui["text"])


def test_timing_without_a_patch(wan, timing):
    """A plain model is no error."""
    assert timing(model=wan, latent={}).args[1] == "no FG-Attn here"


def test_timing_before_a_run_and_with_two_models(wan, sample, patched, timing):
    """Two stages: each model has its own part."""
    one, two = patched(wan), patched(wan)
    assert timing(model=one, latent={}).args[1] == "no run yet"
    sample(one, steps=4)
    text = timing(model=one, latent={}, model_2=two).args[1]
    assert "model 1: sparse" in text and "model 2: no run yet" in text
    assert "no dense step" in text

"""tests/web/object_info.json, what the browser tests' server says of the nodes, is what ComfyUI says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "web" / "object_info.json"
RECORDED = "0.19.3"  # of ComfyUI, the oldest that is supported
TEXTS = ("tooltip", "description", "search_aliases", "output_tooltips")  # of core nodes; not needed


def without_texts(value):
    if isinstance(value, dict):
        return {k: without_texts(v) for k, v in value.items() if k not in TEXTS}
    return [without_texts(v) for v in value] if isinstance(value, (list, tuple)) else value


def info(kind, node):
    """What /object_info says of a node."""
    if hasattr(node, "GET_NODE_INFO_V1"):
        said = node.GET_NODE_INFO_V1()
    else:
        inputs = node.INPUT_TYPES()
        said = {
            "input": inputs,
            "input_order": {part: list(given) for part, given in inputs.items()},
            "output": node.RETURN_TYPES,
            "output_is_list": [False] * len(node.RETURN_TYPES),
            "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
            "name": kind,
            "display_name": kind,
            "category": node.CATEGORY,
            "python_module": "nodes",
            "output_node": getattr(node, "OUTPUT_NODE", False),
        }
    if kind.startswith("FGAttn"):
        return {**said, "python_module": "custom_nodes.fg-attn"}
    return without_texts(said)


@pytest.fixture
def said(classes, monkeypatch):
    """What this ComfyUI says of our nodes and of those in the examples."""
    import folder_paths

    drawn = [
        n
        for file in (ROOT / "example_workflows").glob("*.json")
        for n in json.loads(file.read_text(encoding="utf-8"))["nodes"]
    ]
    models = sorted({m["name"] for n in drawn for m in n["properties"].get("models", [])})
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: models)
    ours = {kind for kind in classes if kind.startswith("FGAttn")}
    return {kind: info(kind, classes[kind]) for kind in sorted({n["type"] for n in drawn} | ours)}


def test_the_record_is_up_to_date(said):
    """It is written anew if it is not: look at the difference and commit it."""
    import comfyui_version

    if comfyui_version.__version__ != RECORDED:
        pytest.skip(f"the record is of ComfyUI {RECORDED}, this is {comfyui_version.__version__}")
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    before = RECORD.read_text(encoding="utf-8") if RECORD.exists() else ""
    RECORD.write_text(text, encoding="utf-8")
    assert text == before, "was out of date and is written anew"


def test_our_nodes_are_the_same_in_every_comfyui(said):
    """What the browser tests see of our nodes holds in this ComfyUI, too, whatever its version."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for kind in (kind for kind in said if kind.startswith("FGAttn")):
        assert json.loads(json.dumps(said[kind])) == recorded[kind]

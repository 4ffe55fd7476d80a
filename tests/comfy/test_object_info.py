"""tests/web/object_info.json, what the browser tests' server says of the nodes, is what ComfyUI says."""

import asyncio
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "web" / "object_info.json"
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


def test_the_record_is_up_to_date(pack, monkeypatch):
    """It is written anew if it is not: look at the difference and commit it."""
    import folder_paths

    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    listed = asyncio.run(sys.modules["fgattn_pack.nodes"].FGAttnExtension().get_node_list())
    ours = {n.GET_SCHEMA().node_id: n for n in listed}
    drawn = [
        n
        for file in (ROOT / "example_workflows").glob("*.json")
        for n in json.loads(file.read_text(encoding="utf-8"))["nodes"]
    ]
    models = sorted({m["name"] for n in drawn for m in n["properties"].get("models", [])})
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: models)
    classes, kinds = {**nodes.NODE_CLASS_MAPPINGS, **ours}, sorted({n["type"] for n in drawn} | set(ours))
    said = {kind: info(kind, classes[kind]) for kind in kinds}
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    before = RECORD.read_text(encoding="utf-8") if RECORD.exists() else ""
    RECORD.write_text(text, encoding="utf-8")
    assert text == before, "was out of date and is written anew"

"""ComfyUI accepts the example workflows: every node, input, value and link."""

import asyncio
import json
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "example_workflows").glob("*.json"))
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}


def as_prompt(graph, classes):
    """What the frontend queues: widget values by position, links by name."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        values = list(node.get("widgets_values") or [])
        inputs = widgets(classes[node["type"]].INPUT_TYPES(), values)
        assert not values, f"{node['type']} has values without an input: {values}"
        inputs |= {given["name"]: links[given["link"]] for given in node["inputs"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widgets(declared, values, prefix=""):
    """Inputs by name, for which values are taken from the front of a list.

    Optional inputs behind its end stay out; newer ComfyUI added some. A dynamic combo has inputs of its own
    for each choice, whose names begin with the combo's.
    """
    inputs, optional = {}, declared.get("optional", {})
    for name, (kind, *rest) in {**declared.get("required", {}), **optional}.items():
        options = rest[0] if rest else {}
        if not (isinstance(kind, list) or kind in WIDGETS):
            continue
        if not values and name in optional:
            continue
        inputs[prefix + name] = value = values.pop(0)
        if kind == DYNAMIC:
            chosen = next(option for option in options["options"] if option["key"] == value)
            inputs |= widgets(chosen["inputs"], values, f"{prefix}{name}.")
        if options.get("control_after_generate"):
            values.pop(0)
    return inputs


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_comfyui_accepts_the_workflow(file, classes, monkeypatch):
    """Validation as on queueing, with the models it names in place."""
    import execution
    import folder_paths

    graph = json.loads(file.read_text(encoding="utf-8"))
    models = [m["name"] for n in graph["nodes"] for m in n["properties"].get("models", [])]
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: models)
    valid, error, _, errors = asyncio.run(execution.validate_prompt("1", as_prompt(graph, classes), None))
    assert valid, (error, errors)


def test_the_comparison_shows_the_difference(classes):
    """Its blends give |dense - sparse|, then make dark differences brighter."""
    import torch

    graph = json.loads((FILES[0].parent / "wan2.1_dense_and_sparse.json").read_text(encoding="utf-8"))
    prompt = as_prompt(graph, classes)
    names = {str(n["id"]): n.get("title") for n in graph["nodes"]}
    frames = {"Dense frames": torch.rand(2, 4, 4, 3), "Sparse frames": torch.rand(2, 4, 4, 3)}
    for number in sorted((n for n in prompt if prompt[n]["class_type"] == "ImageBlend"), key=int):
        given = {
            name: frames[names[value[0]]] if isinstance(value, list) else value
            for name, value in prompt[number]["inputs"].items()
        }
        frames[names[number]] = classes["ImageBlend"].execute(**given).args[0]
    apart = (frames["Dense frames"] - frames["Sparse frames"]).abs()
    torch.testing.assert_close(frames["Difference"], apart)
    torch.testing.assert_close(frames["Difference x 4"], 1 - (1 - apart) ** 4)


def test_wrong_values_are_refused_when_queued(classes, monkeypatch):
    """A tile size that is none, and blocks that are none, never reach the sampler."""
    import execution
    import folder_paths

    graph = json.loads((FILES[0].parent / "wan2.1_t2v.json").read_text(encoding="utf-8"))
    models = [m["name"] for n in graph["nodes"] for m in n["properties"].get("models", [])]
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: models)
    for name, value in (("tile_keys", "24"), ("dense_blocks", "one"), ("threshold", -1.0), ("order", "up")):
        prompt = as_prompt(graph, classes)
        ours = next(node for node in prompt.values() if node["class_type"] == "FGAttnPatch")
        ours["inputs"][name] = value
        valid, _, _, errors = asyncio.run(execution.validate_prompt("1", prompt, None))
        assert not valid and name in str(errors), (name, errors)


def test_prompts_without_advanced_inputs_are_accepted(classes, monkeypatch):
    """All but the first five have defaults: short prompts through the API, and ones stored long ago, run."""
    import execution
    import folder_paths

    graph = json.loads((FILES[0].parent / "wan2.1_t2v.json").read_text(encoding="utf-8"))
    models = [m["name"] for n in graph["nodes"] for m in n["properties"].get("models", [])]
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: models)
    prompt = as_prompt(graph, classes)
    ours = next(node for node in prompt.values() if node["class_type"] == "FGAttnPatch")
    short = ("model", "threshold", "tile_queries", "tile_keys", "warmup_steps")
    ours["inputs"] = {name: ours["inputs"][name] for name in short}
    valid, error, _, errors = asyncio.run(execution.validate_prompt("1", prompt, None))
    assert valid, (error, errors)

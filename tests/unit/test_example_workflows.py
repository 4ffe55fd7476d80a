"""The example workflows are what their script writes; tests/comfy checks them with ComfyUI itself."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "example_workflows"
MAKE = runpy.run_path(str(FOLDER / "make.py"))


def test_every_file_has_its_entry():
    """No workflow is left over from an older script."""
    assert {f.stem for f in FOLDER.glob("*.json")} == set(MAKE["WORKFLOWS"])


@pytest.mark.parametrize("name", MAKE["WORKFLOWS"])
def test_file_is_up_to_date(name):
    """Whoever edits one and not the other is told to run the script."""
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == MAKE["text"](name), "run make.py"


@pytest.mark.parametrize("name", MAKE["WORKFLOWS"])
def test_both_ends_of_every_link_agree(name):
    """Type and number of a link stand at its source and at its target."""
    graph = MAKE["workflow"](MAKE["WORKFLOWS"][name])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, place, kind in graph["links"]:
        output, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"] and given["link"] == number
        assert output["type"] == given["type"] == kind

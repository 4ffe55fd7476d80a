"""The map node on a real run, by itself and in ComfyUI's own executor."""

import sys
import types

import pytest
import torch

PLACE = {"frame": 2, "row": 3, "column": 4}


@pytest.fixture
def map_node(pack, tmp_path, monkeypatch):
    """The node class as the graph has it under an id, writing its previews to a folder of its own."""
    import folder_paths
    from comfy_api.latest import io

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    node = sys.modules["fgattn_pack.nodes"].FGAttnMap
    return lambda key="2": node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: key}})


@pytest.fixture
def drawn(map_node):
    """Ask for the latent, sample, draw; the last call's text and both pictures."""

    def draw(model, sampling=None, block=1, head=1, step=0, **place):
        node, chosen = map_node(), {"model": model, "block": block, "head": head, "step": step, **place}
        assert node.check_lazy_status(**chosen) == ["latent"]
        if sampling:
            sampling(model)
        latent = {"samples": torch.zeros(1)}
        assert node.check_lazy_status(latent=latent, **chosen) == []
        result = node.execute(latent=latent, **chosen)
        assert result.args[2] is latent and len(result.ui["images"]) == 1
        for picture in result.args[:2]:
            assert picture.ndim == 4 and picture.shape[3] == 3
            assert picture.min() >= 0 and picture.max() <= 1
        return result.ui["text"][0], *result.args[:2]

    return draw


def patch_of(model):
    return sys.modules["fgattn_pack.nodes.patch"].patch_of(model)


def test_map_of_a_real_run(wan, sample, patched, drawn):
    """The last sparse step by default; both pictures are large and have colours."""
    model = patched(wan, warmup_steps=2)
    text, *pictures = drawn(model, sample)
    assert text.startswith("block 1, head 1, step 8 of 8: the tile computes ")
    assert all(p.shape[1] > 200 and p.shape[2] >= 900 and p.std() > 0.02 for p in pictures)
    maps = patch_of(model).engine.last_maps
    assert [*maps.kept] == [(step, block) for step in range(2, 8) for block in range(3)]
    assert maps.find(7, 1, 0)[1].layout.grid == (3, 8, 12)


def test_other_choices_need_no_other_run(wan, sample, patched, drawn):
    """Every block, head and sparse step of one run."""
    model = patched(wan, warmup_steps=2)
    first = drawn(model, sample)
    last = patch_of(model).engine.last_report
    seen = {
        drawn(model, block=block, head=head, step=step)[0]
        for block in range(3)
        for head in range(2)
        for step in range(3, 9)
    }
    assert len(seen) == 36 and first[0] in seen and patch_of(model).engine.last_report is last


def test_the_place_is_said_before_the_run(wan, sample, patched, drawn):
    """Asking for the latent comes first; a place that changes later waits for the next run."""
    model = patched(wan, warmup_steps=2)
    _, here, _ = drawn(model, sample, **PLACE)
    maps = patch_of(model).engine.last_maps
    assert maps.places == {"2": (2, 3, 4)}
    assert maps.find(-1, 0, 0)[1].queries(0).reshape(3, 8, 12)[1, 2, 3]
    _, same, _ = drawn(model, **PLACE | {"row": 8})
    assert patch_of(model).engine.last_maps is maps
    assert not torch.equal(same, here)  # it says which tile it shows
    drawn(model, sample, **PLACE | {"row": 8})
    assert patch_of(model).engine.last_maps.places == {"2": (2, 8, 4)}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block": 3}, "block: got 3; allowed: 0 to 2."),
        ({"head": 2}, "head: got 2; allowed: 0 to 1."),
        ({"step": 9}, "step: got 9; allowed: 1 to 8."),
        ({"step": 1}, "block 1, step 1 of 8: no map. warm-up step; steps with a map of block 1: 3 to 8"),
    ],
)
def test_what_has_no_map_is_said_in_words(wan, sample, patched, drawn, wrong, says):
    """In the picture, not as an error: a wrong number must not cost a render that is done."""
    text, picture, density = drawn(patched(wan, warmup_steps=2), sample, **wrong)
    assert text.startswith(says) and picture.std() > 0.02 and density.std() > 0.02


def test_dense_runs_and_no_runs(wan, sample, patched, drawn):
    """Why there is nothing to see."""
    model = patched(wan, min_tokens=10_000)
    assert drawn(model)[0] == "no run yet"
    assert "no map. fewer than 10000 tokens" in drawn(model, sample)[0]
    assert "does not come through FG-Attn" in drawn(wan)[0]


def test_estimate_is_of_the_run_and_changes_nothing(wan, sample, patched, report):
    """On by default; the same video, bit by bit, without it."""
    model, without = patched(wan), patched(wan, estimate_error=False)
    assert torch.equal(sample(model), sample(without))
    assert 0 < report(model).estimated_error < 1 and report(without).estimated_error is None


@pytest.fixture
def queue(pack, map_node, wan, sample, monkeypatch):
    """Queue a graph in ComfyUI's executor, the sampler named first; returns the times that it sampled."""
    import execution

    import nodes

    sampled = []

    class Loader:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def load(self):
            return (wan,)

    class Sampler:
        RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "sample", "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "seed": ("INT",)}})

        def sample(self, model, seed):
            samples = sample(model, seed=seed)
            sampled.append(patch_of(model).engine.last_maps.places)
            return ({"samples": samples},)

    class Saver:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "test", True
        INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",)}})

        def save(self, latent):
            return ()

    ours = sys.modules["fgattn_pack.nodes"]
    for name, node in (
        ("Loader", Loader),
        ("Sampler", Sampler),
        ("Saver", Saver),
        ("FGAttnPatch", ours.FGAttnPatch),
        ("FGAttnInspect", ours.FGAttnMap),
    ):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    server = types.SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})

    def run(seed=0, second=None, **chosen):
        prompt = {
            "1": ("Saver", {"latent": ["2", 0]}),
            "2": ("Sampler", {"model": ["4", 0], "seed": seed}),
            "3": ("Loader", {}),
            "4": (
                "FGAttnPatch",
                {
                    "model": ["3", 0],
                    "threshold": 1.0,
                    "tile_queries": "128",
                    "tile_keys": "16",
                    "warmup_steps": 2,
                },
            ),
            "5": (
                "FGAttnInspect",
                {"model": ["4", 0], "latent": ["2", 0], "block": 0, "head": 0, "step": 0, **chosen},
            ),
        }
        if second is not None:
            kind, inputs = prompt["5"]
            prompt["6"] = kind, {**inputs, **second}
        prompt = {k: {"class_type": kind, "inputs": inputs} for k, (kind, inputs) in prompt.items()}
        executor.execute(prompt, "x", {}, [key for key in prompt if key in "156"])
        assert executor.success, executor.status_messages
        return sampled, executor.history_result["outputs"]["5"]["text"][0]

    return run


def test_in_comfyuis_own_order(queue):
    """The place is known before the sampler starts; another head draws from the run that is cached."""
    assert queue(**PLACE)[0] == [{"5": (2, 3, 4)}]
    sampled, text = queue(**PLACE, head=1, step=5)
    assert len(sampled) == 1 and text.startswith("block 0, head 1, step 5 of 8: the tile computes")
    sampled, text = queue(seed=1, frame=1, block=2)
    assert sampled == [{"5": (2, 3, 4)}, {"5": (1, 0, 0)}]
    assert text.startswith("block 2, head 0, step 8 of 8: the tile")
    sampled, text = queue(seed=2, block=7)
    assert len(sampled) == 3 and text.startswith("block: got 7; allowed: 0 to 2.")


def test_two_map_nodes_have_a_tile_each(queue, monkeypatch):
    """On one model: one run keeps both, each node draws its own."""
    drawn = []
    chart = sys.modules["fgattn_pack.nodes.maps"].map_chart
    draw = chart.draw_map

    def record(found, head, title, note):
        drawn.append((found.queries(head).reshape(3, 8, 12), note))
        return draw(found, head, title, note)

    monkeypatch.setattr(chart, "draw_map", record)
    last = {"frame": 3, "row": 8, "column": 12}
    assert queue(**PLACE, second=last)[0] == [{"5": (2, 3, 4), "6": (3, 8, 12)}]
    assert {(bool(own[1, 2, 3]), bool(own[2, 7, 11])) for own, _ in drawn} == {(False, True), (True, False)}
    assert not [note for _, note in drawn if "place was changed" in note]
    sampled, _ = queue(seed=1, **PLACE, second=last)
    assert sampled[1] == sampled[0]

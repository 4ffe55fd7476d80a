"""A render always comes out: whatever fails in telling, drawing, copying, or is not there at all."""

import copy
import sys
import types

import pytest
import torch
from makers import by_text

BLOCKS = 3
SECOND = "not in force: this is the second model"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def raising(*_, **__):
    raise RuntimeError("out of luck")


class Raising:
    """A server whose every method raises."""

    client_id = "tab"

    def __getattr__(self, name):
        return raising


class Wordless(Exception):
    """An error that cannot be shown."""

    def __str__(self):
        raise RuntimeError("no words")


class Speechless(Raising):
    """A server whose errors cannot be shown either."""

    def __getattr__(self, name):
        def fail(*_, **__):
            raise Wordless

        return fail


class Pageless:
    """A server that fails when it is asked for the page."""

    client_id = property(raising)


SERVERS = {
    "lacks everything": lambda: types.SimpleNamespace(client_id="tab"),
    "raises": Raising,
    "raises what cannot be shown": Speechless,
    "fails for the page": Pageless,
    "has a page that is no text": lambda: types.SimpleNamespace(client_id=[]),
}


@pytest.fixture(params=[*SERVERS, "does not load"])
def server(request, monkeypatch):
    """A host whose server is of no use."""
    module = types.ModuleType("server")
    if request.param in SERVERS:
        module.PromptServer = types.SimpleNamespace(instance=SERVERS[request.param]())
    else:
        module.__getattr__ = raising
    monkeypatch.setitem(sys.modules, "server", module)
    return request.param


@pytest.fixture
def nodes(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return sys.modules["fgattn_pack.nodes"]


def test_a_render_with_such_a_server(wan, sample, patched, report, server, monkeypatch):
    """Sparse, after a failure of ours, and after one of others: the same as without a server."""
    execute = sys.modules["fgattn_pack.fgattn.backends.execute"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "server", None)
        wanted, dense = sample(patched(wan)), sample(wan)
    model = patched(wan, live=True)
    assert torch.equal(sample(model), wanted) and by_text(report(model))["sparse"] == 8 * BLOCKS
    monkeypatch.setattr(execute, "plan_of", raising)
    assert torch.equal(sample(model), dense) and "out of luck" in report(model).failure

    def broken(*_, **__):
        raise ZeroDivisionError

    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = broken
    with pytest.raises(ZeroDivisionError):
        sample(patched(model), steps=4)


def test_the_pack_loads_with_such_a_server(nodes, waited, server):
    """Its nodes are there; only its routes may be missing."""
    extension = nodes.FGAttnExtension()
    waited(extension.on_load())
    assert len(waited(extension.get_node_list())) == 3


@pytest.mark.parametrize(
    "place",
    [
        "fgattn.runs.stats.RunStats.begin_step",
        "fgattn.runs.stats.RunStats.timed",
        "fgattn.runs.stats.RunStats.add_plan",
        "fgattn.runs.stats.RunStats.add_estimate",
        "fgattn.runs.stats.RunStats.so_far",
        "fgattn.runs.stats.RunStats.report",
        "fgattn.runs.clock.Clock.mark",
        "fgattn.runs.clock.Clock.passed",
        "fgattn.runs.clock.Clock.milliseconds",
        "fgattn.runs.maps.Maps.keep",
        "fgattn.runs.maps.Maps.skip",
        "fgattn.runs.maps.Maps.to_host",
        "fgattn.runs.run.Run.check_blocks",
        "fgattn.runs.steps.Steps.evaluated",
        "fgattn.runs.engine.Engine.begin_run",
        "fgattn.runs.engine.Engine.end_run",
        "fgattn.backends.compile_log.start",
        "fgattn.backends.compile_log.stop",
        "nodes.patch.video_of",
        "nodes.patch.headline",
        "nodes.override.call_layout",
        "nodes.override.call_block",
        "nodes.override.call_branch",
        "nodes.live.snapshot",
        "nodes.live.tell",
        "nodes.recent.RECENT.note",
    ],
)
def test_a_failure_anywhere_in_the_books(nodes, wan, sample, patched, monkeypatch, place):
    """Threshold 0 with a dense step: the video is the model's own, wherever the failure is."""
    live = sys.modules["fgattn_pack.nodes.live"]
    monkeypatch.setattr(live, "prompt_server", lambda: types.SimpleNamespace(client_id="tab"))
    dense, (*path, name) = sample(wan, steps=4), place.split(".")
    depth = next(i for i in range(len(path), 0, -1) if ".".join(["fgattn_pack", *path[:i]]) in sys.modules)
    owner = sys.modules[".".join(["fgattn_pack", *path[:depth]])]
    for part in path[depth:]:
        owner = getattr(owner, part)
    model = patched(wan, threshold=0.0, warmup_steps=1)
    monkeypatch.setattr(owner, name, raising)
    assert relative(sample(model, steps=4), dense) < 1e-4
    latent = {"samples": torch.zeros(1)}
    assert nodes.FGAttnTiming.execute(model, latent).args[0] is latent
    assert nodes.FGAttnMap.execute(model=model, latent=latent, block=0, head=0, step=0).args[2] is latent


@pytest.mark.parametrize(
    "place",
    ["timing.chart.draw", "timing.report.text", "maps.map_chart.draw_density", "pictures.ui.PreviewImage"],
)
def test_a_failure_in_a_drawing(nodes, wan, sample, patched, monkeypatch, place):
    """The latent goes on to the decoder; words say what failed, or the text is there without its picture."""
    model, latent = patched(wan, warmup_steps=1), {"samples": torch.zeros(1)}
    sample(model, steps=4)
    module, part, name = place.split(".")
    monkeypatch.setattr(getattr(sys.modules[f"fgattn_pack.nodes.{module}"], part), name, raising)
    timing = nodes.FGAttnTiming.execute(model, latent)
    drawn = nodes.FGAttnMap.execute(model=model, latent=latent, block=0, head=0, step=0)
    assert timing.args[0] is latent and drawn.args[2] is latent
    assert all(picture.ndim == 4 for picture in (timing.args[2], *drawn.args[:2]))
    said = timing.args[1] + drawn.ui["text"][0]
    assert ("out of luck" in said) == (place in ("timing.report.text", "maps.map_chart.draw_density"))


def test_scripts_call_all_three_nodes(nodes, wan, sample, monkeypatch):
    """Without a graph the nodes have no id, and there is no page."""
    monkeypatch.setitem(sys.modules, "server", None)
    assert nodes.FGAttnPatch.hidden is None
    (model,) = nodes.FGAttnPatch.execute(wan, threshold=1.0, tile_queries="16", tile_keys="16").args
    chosen = {"model": model, "block": 0, "head": 0, "step": 0, "frame": 2}
    assert nodes.FGAttnMap.check_lazy_status(**chosen) == ["latent"]
    latent = {"samples": sample(model, steps=4)}
    text = nodes.FGAttnTiming.execute(model, latent).args[1]
    assert text.startswith("sparse: ")
    drawn = nodes.FGAttnMap.execute(latent=latent, **chosen)
    assert "the tile computes" in drawn.ui["text"][0] and "place was changed" not in drawn.ui["text"][0]


def test_copies_of_a_models_options(wan, sample, patched, report):
    """A copy shares the patch, as a clone does: it samples the same, and the model's own nodes report it."""
    model = patched(wan)
    wanted = sample(model)
    copied = model.clone()
    copied.model_options = copy.deepcopy(model.model_options)
    copied.wrappers, copied.callbacks = copy.deepcopy(model.wrappers), copy.deepcopy(model.callbacks)
    first = report(model)
    assert torch.equal(sample(copied), wanted)
    assert report(model) is not first and report(copied) is report(model)
    assert by_text(report(model)) == by_text(first)


@pytest.fixture
def pair(wan_weights, pack, monkeypatch):
    """Two models of one kind, the second one with a node, what nodes say, and its patch."""
    import comfy.sd

    module = sys.modules["fgattn_pack.nodes.patch"]
    settings = sys.modules["fgattn_pack.fgattn.settings"]
    said = []
    monkeypatch.setattr(module, "show", lambda node, text: said.append((node, text)))
    first, second = (comfy.sd.load_diffusion_model_state_dict(dict(wan_weights)) for _ in range(2))
    patch = module.Patch(settings.Settings(threshold=2.0), settings.Policy(warmup_steps=0), "2")
    return first, patch.install(second), patch, said


def conditions(seed=0):
    import comfy.samplers

    noise = torch.randn(1, 16, 3, 16, 24, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(2, 1, 8, 4096, generator=torch.Generator().manual_seed(seed + 1))
    return noise, *([[t, {}]] for t in text), comfy.samplers.sampler_object("euler")


@pytest.mark.parametrize("both", [False, True], ids=["second alone", "both"])
def test_the_second_model_of_a_guider_of_core(nodes, pair, patched, report, sample, both):
    """Dual Model CFG Guider samples it in the first one's run: its node says that it has no effect."""
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider with two models; 0.33 has")
    first, second, patch, said = pair
    first = patched(first) if both else first
    noise, positive, negative, sampler = conditions()
    guider = nodes_custom_sampler.Guider_DualModel(first, second)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    sigmas = torch.linspace(1, 0, 5)
    sample(second, steps=4)  # by itself it runs, and reports
    assert patch.engine.last_report and not [text for _, text in said if text.startswith(SECOND)]
    for _ in range(2):
        said.clear()
        with torch.inference_mode():
            out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
        assert out.isfinite().all()
        assert [text.startswith(SECOND) for node, text in said if node == "2"] == [True]
    assert nodes.FGAttnTiming.execute(second, {}).args[1].startswith(SECOND)
    if both:
        assert by_text(report(first))["sparse"] == 2 * 4 * BLOCKS
    sample(second, steps=4)
    assert by_text(patch.engine.last_report)["sparse"] == 4 * BLOCKS


@pytest.mark.parametrize("prepared", [False, True])
def test_the_second_model_of_another_guider(pair, prepared):
    """One that evaluates it with its own options: its calls come while no run of its own is going on."""
    import comfy.samplers

    first, second, _, said = pair
    noise, positive, negative, sampler = conditions()

    class Two(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            ours = super().predict_noise(x, timestep, model_options, seed)
            other = comfy.samplers.calc_cond_batch(
                second.model, [self.conds["negative"]], x, timestep, second.model_options
            )
            return 2 * ours - other[0]

    guider = Two(first)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    if prepared:
        second.pre_run()
    second.model.current_patcher = second
    with torch.inference_mode():
        out = guider.sample(
            noise, torch.zeros_like(noise), sampler, torch.linspace(1, 0, 5), disable_pbar=True, seed=0
        )
    assert out.isfinite().all()
    assert [(node, text.startswith(SECOND)) for node, text in said] == [("2", True)]

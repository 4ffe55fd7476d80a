"""A user's first minutes in a real ComfyUI: its server, its page in headless Chromium, a tiny model.

Needs Chromium and `pip install playwright==1.65.2`. COMFYUI_FRONTEND, the folder `static` of another
comfyui-frontend-package, takes its place. Rare cases: tests/web/test_browser.py.
"""

import contextlib
import itertools
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    bool(pages.MISSING), reason=f"no {', no '.join(pages.MISSING)}: the page of a real ComfyUI is not tested"
)
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
FRONTEND = os.environ.get("COMFYUI_FRONTEND")
START = 240  # seconds that ComfyUI may take; a busy machine needs more than one
RUN = 120
SEEDS = itertools.count(1)  # what an earlier test ran, ComfyUI would not run again
# Instead of a text encoder of gigabytes.
TEXT_NODE = """
import torch

class RandomText:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING", "CONDITIONING"), "make", "test"
    def make(self, seed):
        both = torch.randn(2, 1, 8, 4096, generator=torch.Generator().manual_seed(seed))
        return tuple([[text, {}]] for text in both)

NODE_CLASS_MAPPINGS = {"RandomText": RandomText}
"""


@pytest.fixture(scope="module")
def comfyui(wan_weights, tmp_path_factory):
    """Address of a ComfyUI with the pack and a tiny Wan model, in a process of its own."""
    from safetensors.torch import save_file

    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes/random_text", "models/diffusion_models", "user", "input", "output"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "random_text" / "__init__.py").write_text(TEXT_NODE, encoding="utf-8")
    (base / "custom_nodes" / "fg-attn").symlink_to(ROOT, target_is_directory=True)
    save_file(wan_weights, base / "models" / "diffusion_models" / "tiny.safetensors")
    for model in [model for file in EXAMPLES for model in models_of(file)[1]]:  # nobody runs these
        (base / "models" / model["directory"]).mkdir(exist_ok=True)
        (base / "models" / model["directory"] / model["name"]).touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "main.py",
        "--cpu",
        "--port",
        str(port),
        "--disable-api-nodes",
        "--base-directory",
        str(base),
        "--database-url",
        "sqlite:///:memory:",
        *(["--front-end-root", FRONTEND] if FRONTEND else []),
    ]
    with open(base / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=os.environ["COMFYUI_PATH"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + START
        while not answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail("ComfyUI did not start:\n" + (base / "log").read_text(errors="replace")[-4000:])
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def answers(url):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(url + "object_info/FGAttnPatch", timeout=5).status == 200
    return False


def workflow(seed):
    """The smallest graph with our three nodes, written as the examples are."""
    make = runpy.run_path(str(ROOT / "example_workflows" / "make.py"))
    node, latent = make["Node"], make["LATENT"]
    sampler = make["sampler"]("fgattn", (870, 0))
    sampler.links["positive"], sampler.links["negative"] = (("text", i, "CONDITIONING") for i in (0, 1))
    sampler.widgets = [seed, "fixed", 12, 2.0, "euler", "simple", 1.0]
    return make["workflow"](
        {
            "unet": node(
                "UNETLoader",
                (0, 0),
                (390, 82),
                widgets=["tiny.safetensors", "default"],
                outputs=make["MODEL"],
            ),
            "text": node(
                "RandomText", (0, 140), (390, 106), widgets=[1, "fixed"], outputs=make["CONDITIONING"] * 2
            ),
            "size": node(
                "EmptyHunyuanLatentVideo", (0, 300), (390, 130), widgets=[384, 256, 17, 1], outputs=latent
            ),
            "fgattn": make["patch"]("unet", (430, 0)),
            "sampler": sampler,
            "timing": make["timing"]((1225, 0), "sampler", "fgattn"),
            "map": node(
                "FGAttnInspect",
                (1745, 0),
                (480, 700),
                {"model": ("fgattn", 0, "MODEL"), "latent": ("sampler", 0, "LATENT")},
                [1, 0, 0, 0, 0, 0],
                [("map", "IMAGE"), ("density", "IMAGE"), *latent],
            ),
        }
    )


@pytest.fixture(params=(False, True), ids=("canvas", "vue"))
def page(request, comfyui, browser):
    """ComfyUI's page with the workflow; an error in its console fails the test."""
    settings = json.dumps(pages.settings(request.param)).encode()
    urllib.request.urlopen(urllib.request.Request(comfyui + "settings", settings), timeout=30).close()
    with pages.opened(browser, comfyui, request.param) as opened:
        pages.load(opened, workflow(next(SEEDS)))
        yield opened


def run(page):
    page.get_by_role("button", name="Run", exact=True).first.click()


def wait_for(page, words):
    """Until the panel's heading says it."""
    page.wait_for_function(
        "words => document.querySelector('.fgattn-head')?.innerText.includes(words)",
        arg=words,
        timeout=RUN * 1000,
    )


def finished(page, number):
    """Until this page's prompts are through, all without an error."""
    deadline = time.monotonic() + RUN
    while (
        len(
            ends := page.evaluate("""async () => Object.values(await (await fetch('/history')).json())
            .filter(h => h.prompt[3].client_id === app.api.clientId).map(h => h.status)""")
        )
        < number
    ):
        assert time.monotonic() < deadline, f"{len(ends)} of {number} prompts are through"
        page.wait_for_timeout(300)
    assert [end["status_str"] for end in ends] == ["success"] * number, ends


def status(page):
    """The line on the patch node, ComfyUI's or ours."""
    page.wait_for_timeout(1000)  # ours appears when ComfyUI has taken its own away
    kept = page.evaluate("""app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                            .widgets.find(w => w.name === '$$node-text-preview')?.value ?? ''""")
    ours = page.locator(".fgattn-status").inner_text()
    assert not (kept and ours), (kept, ours)
    return kept or ours


def see_map(page):
    """Until the map node shows a picture of both charts' size."""
    page.wait_for_function("""() => {
        const node = app.graph._nodes.find(n => n.comfyClass === 'FGAttnInspect');
        const drawn = node.imgs?.[0] ?? document.querySelector(`[data-node-id='${node.id}'] img`);
        return drawn?.naturalWidth >= 900 && drawn.naturalHeight >= 600; }""")


def click_title(page, kind):
    at = page.evaluate(
        """kind => {
        const [x, y] = app.graph._nodes.find(n => n.comfyClass === kind).pos;
        return app.canvasPosToClientPos([x + 60, y - 15]); }""",
        kind,
    )
    page.mouse.click(*at)


def test_first_minutes(page):
    """Slider by mouse, Run, panel, status line, map; the panel's node is deleted and the rest runs again."""
    pages.slider(page, "threshold", 0.25)
    assert 1.2 < pages.value(page, "threshold") < 2.8
    run(page)
    wait_for(page, "dense: warm-up step")
    wait_for(page, "est. error")
    wait_for(page, "done, step 12 of 12")
    finished(page, 1)
    panel = pages.text(page)
    assert page.locator(".fgattn-runs tbody tr").count() == 1
    assert page.locator("figure[aria-label^='time per step'] rect.fgattn-sparse").count() == 10
    assert "block 0 at the top, 2 at the bottom" in panel and "estimated error" in panel
    line = status(page)
    assert re.fullmatch(r"sparse: [\d.]+ % of scores, attention [\d.]+x (fast|slow)er, est. error .+%", line)
    assert line in panel
    see_map(page)

    click_title(page, "FGAttnTiming")
    page.keyboard.press("Delete")
    page.wait_for_function("!app.graph._nodes.some(n => n.comfyClass === 'FGAttnTiming')")
    assert page.locator(".fgattn-panel").count() == 0
    pages.slider(page, "threshold", 0.6)
    run(page)
    finished(page, 2)
    again = status(page)
    assert again.startswith("sparse: ") and again != line


def test_live_slider(page):
    """A slider that is moved while the model samples changes the steps after it, and the panel says so."""
    page.evaluate("""() => { app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                             .widgets.find(w => w.name === 'live').value = true; }""")
    run(page)
    wait_for(page, "warm-up step")
    pages.slider(page, "threshold", 0.5)
    wait_for(page, "done, step 12 of 12")
    told = re.search(r"sliders moved, (.*)", pages.text(page))
    assert told and f"threshold {pages.value(page, 'threshold'):g}" in told[1], told
    finished(page, 1)


def models_of(file):
    """An example without its models, of whose addresses the page would ask whether they can be reached."""
    graph = json.loads(file.read_text(encoding="utf-8"))
    return graph, [m for node in graph["nodes"] for m in node["properties"].pop("models", [])]


def test_templates(classes, waited, comfyui, browser, monkeypatch):
    """The page loads each example without a complaint, and what it queues is valid.

    Newer ComfyUI has inputs that 0.19.3 lacks.
    """
    import execution
    import folder_paths

    with pages.opened(browser, comfyui, False) as page:
        for file in EXAMPLES:
            graph, models = models_of(file)
            names = [model["name"] for model in models]
            monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder, names=names: names)
            pages.load(page, graph)
            page.wait_for_timeout(1000)  # the page looks for what is missing after it has loaded the graph
            said = re.search(r".*\d+ (issues? found|errors?\b).*", page.inner_text("body"), re.IGNORECASE)
            assert not said, (file.name, said[0])
            queued = page.evaluate("async () => (await app.graphToPrompt()).output")
            valid, error, _, errors = waited(execution.validate_prompt("1", queued, None))
            assert valid, (file.name, error, errors)

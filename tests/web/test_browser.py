"""The pack on ComfyUI's real page in headless Chromium: two frontends, a year apart, and both renderers.

`make browser` installs what this needs and runs it.
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
from fgattn.runs.reports import BlockReport, RunReport, StepReport
from fgattn.show import snapshot
from fgattn.show.text import headline
from makers import CHOSEN, by_reason
from pages import load, patch_id, slider, started, text, value

EXAMPLE = Path(__file__).parents[2] / "example_workflows" / "wan2.1_t2v.json"
FRONTENDS = sorted((Path(sys.prefix) / "frontends").glob("*/comfyui_frontend_package/static"))
MISSING = [*pages.MISSING, *(["frontends"] if len(FRONTENDS) < 2 else [])]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', no '.join(MISSING)}: the real page is not tested (make browser)"
)


@pytest.fixture(
    params=[(f, vue) for f in FRONTENDS or [Path("none/x/static")] for vue in (False, True)],
    ids=lambda p: f"{p[0].parts[-3]}-{'vue' if p[1] else 'canvas'}",
)
def page(request, browser):
    """ComfyUI's page with the example workflow; an error in its console fails the test."""
    server_of = runpy.run_path(str(Path(__file__).parent / "page_server.py"))["Server"]
    frontend, vue = request.param
    with server_of(frontend, pages.settings(vue)) as server, pages.opened(browser, server.url, vue) as opened:
        opened.server = server
        load(opened, json.loads(EXAMPLE.read_text(encoding="utf-8")))
        yield opened


def report(steps):
    """A run of 8 steps, 2 of them warm-up."""
    done = tuple(
        StepReport(i, 900.0, 500.0, 0.0, 0, 8, True) if i < 2 else StepReport(i, 900.0, 200.0, 20.0, 8, 0)
        for i in range(steps)
    )
    return RunReport(
        CHOSEN,
        32760,
        "triton",
        "GPU",
        900.0 * steps,
        done,
        tuple(BlockReport(b, 0.2 + b / 100, 0.3) for b in range(8)),
        by_reason(sparse=8 * steps),
        5.0,
        2.0,
        0.26,
        0.3,
        None,
        None,
        scheduled=8,
        sliders=((0, 1.0, 2),),
    )


def play(page, node, steps=8, last="done"):
    """Queue, and let the server tell of a run with messages made by the pack itself."""
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_timeout(500)
    server, prompt = page.server, f"p{len(page.server.queued)}"
    server.send("execution_start", {"prompt_id": prompt, "timestamp": 1})
    server.send("executing", {"node": "sampler", "display_node": "sampler", "prompt_id": prompt})
    for step in range(steps + 1):
        told = snapshot.snapshot(report(step), node, prompt, "running")
        server.send("fgattn.progress", told)
        server.send_text(f"{told['headline']}, step {step} of 8", node)
    if last:
        server.send("fgattn.progress", snapshot.snapshot(report(steps), node, prompt, last))
        server.send_text(headline(report(steps)), node)
        server.send("execution_success", {"prompt_id": prompt, "timestamp": 2})
    page.wait_for_timeout(700)


def old(page):
    """The first of the two releases: before ComfyUI 0.19.3, the oldest that the pack is for."""
    return "1.30." in str(page.server.frontend)


def test_move_save_reload_run(page):
    """A user's first minutes: sliders by mouse, the workflow saved and opened again, a run in the panel."""
    slider(page, "threshold", 0.25)
    slider(page, "warmup_steps", 0.2)
    moved = value(page, "threshold"), value(page, "warmup_steps")
    assert 1.2 < moved[0] < 2.8 and 4 < moved[1] < 14, moved
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    stored, made = (
        next(n["widgets_values"] for n in json.loads(graph)["nodes"] if n["type"] == "FGAttnPatch")
        for graph in (saved, EXAMPLE.read_text(encoding="utf-8"))
    )
    assert len(stored) == len(made), "buttons are not saved"
    page.evaluate("app.graph.clear()")
    load(page, json.loads(saved))
    assert (value(page, "threshold"), value(page, "warmup_steps")) == moved
    assert page.locator(".fgattn-panel").count() == 1 and "No run yet" in text(page)
    play(page, patch_id(page))
    inputs = page.server.queued[0]["prompt"][patch_id(page)]["inputs"]
    assert (inputs["threshold"], inputs["warmup_steps"]) == moved and inputs["live"] is False
    assert "fgattn_presets" not in inputs
    assert "26 % of scores" in text(page) and "done, step 8 of 8" in text(page)
    assert page.locator(".fgattn-runs tbody tr").count() == 1
    assert page.locator(".fgattn-panel rect.fgattn-sparse").count() > 6
    assert not page.server.moved, "the live switch is off"


def test_status_line_of_the_server(page):
    """It needs none of our JavaScript. The first Vue renderer keeps such a text, but does not draw it."""
    play(page, patch_id(page), steps=3, last=None)
    line = "sparse: 26 % of scores, attention 2.50x faster, step 3 of 8"
    assert value(page, "$$node-text-preview") == line
    if not (page.vue and old(page)):
        shown = page.locator(f"text={line}")
        assert shown.count() == 1 and shown.first.is_visible()


def test_status_line_after_the_run(page):
    """Newer frontends take the server's text away when the prompt ends; then our line says it, never both."""
    play(page, patch_id(page))
    page.wait_for_timeout(500)
    kept = page.evaluate("""app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                            .widgets.some(w => w.name === '$$node-text-preview')""")
    line = page.locator(".fgattn-status").inner_text()
    assert line == ("" if kept else "sparse: 26 % of scores, attention 2.50x faster")


def test_live_slider(page):
    """With the switch on, and only while the node samples, moves go to the server; the last one counts."""
    page.evaluate("""() => { app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                             .widgets.find(w => w.name === 'live').value = true; }""")
    slider(page, "threshold", 0.2)
    assert not page.server.moved
    play(page, patch_id(page), steps=3, last=None)
    slider(page, "threshold", 0.6)
    page.wait_for_timeout(500)
    last = page.server.moved[-1]
    assert (last["node"], last["threshold"], last["warmup_steps"]) == (
        patch_id(page),
        value(page, "threshold"),
        value(page, "warmup_steps"),
    )
    assert 3 < last["threshold"] < 6
    assert last["client"] == page.evaluate("import('/scripts/api.js').then(m => m.api.clientId)")
    assert len(page.server.moved) < 9, "moves are gathered"
    page.server.send("fgattn.progress", snapshot.snapshot(report(8), patch_id(page), "p1", "done"))
    page.wait_for_timeout(300)
    number = len(page.server.moved)
    slider(page, "threshold", 0.3)
    page.wait_for_timeout(400)
    assert len(page.server.moved) == number


def test_deleted_nodes_leave_nothing(page):
    """No panel, no drawing; a lost connection and a new one in the middle of a run change nothing."""
    play(page, patch_id(page), steps=2, last=None)
    node = patch_id(page)
    page.server.drop()
    page.wait_for_timeout(1500)
    assert "step 2 of 8" in text(page)
    page.server.send("fgattn.progress", snapshot.snapshot(report(5), patch_id(page), "p1", "running"))
    page.wait_for_timeout(500)
    assert "step 5 of 8" in text(page)
    page.evaluate("""() => { window.fgattnFrames = 0; const request = window.requestAnimationFrame;
        window.requestAnimationFrame = (f) => { if (/panel/.test(String(f))) window.fgattnFrames += 1;
                                                return request(f); };
        for (const n of app.graph._nodes.filter(n => /^FGAttn/.test(n.comfyClass))) app.graph.remove(n); }""")
    page.server.send("fgattn.progress", snapshot.snapshot(report(6), node, "p1", "running"))
    page.wait_for_timeout(500)
    assert page.locator(".fgattn-panel, .fgattn-presets").count() == 0
    assert page.evaluate("window.fgattnFrames") == 0


def test_width_of_the_timing_node(page):
    """A new one fits its panel; of saved ones, only what would cut the table is widened."""
    widths = []
    for saved in (480, 370, 140):
        graph = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        next(n for n in graph["nodes"] if n["type"] == "FGAttnTiming")["size"][0] = saved
        load(page, graph)
        widths.append(page.evaluate("app.graph._nodes.find(n => n.comfyClass === 'FGAttnTiming').size[0]"))
    np.testing.assert_allclose(widths, (480, 370, 350), atol=10)  # the first Vue renderer: less its border
    play(page, patch_id(page))
    pages.slider(page, "threshold", 0.25)
    play(page, patch_id(page))
    assert page.evaluate("""() => { const body = document.querySelector('.fgattn-body');
                                    return body.scrollWidth <= body.clientWidth; }""")
    page.evaluate("""() => { app.graph.clear(); const node = LiteGraph.createNode('FGAttnTiming');
                             app.graph.add(node); }""")
    page.wait_for_timeout(500)
    assert page.evaluate("app.graph._nodes[0].size[0]") == pytest.approx(420, abs=10)


def test_presets(page):
    """Buttons set the sliders."""
    page.locator(".fgattn-presets button", has_text="fast").click()
    assert (value(page, "threshold"), value(page, "warmup_steps")) == (2, 1)


def test_a_thousand_events(page):
    """The page stays quick, and keeps one table of six runs."""
    node = patch_id(page)
    for run in range(10):
        for step in range(100):
            now = dataclasses.replace(report(8), total=step)
            page.server.send("fgattn.progress", snapshot.snapshot(now, node, f"r{run}", "running"))
    page.server.send("fgattn.progress", {"version": 1, "node": []})
    page.wait_for_timeout(1000)
    assert page.locator(".fgattn-runs tbody tr").count() == 6
    assert (
        page.evaluate("""() => new Promise(done => {
        const start = performance.now();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
    })""")
        < 1000
    )


def test_chinese(page):
    """The page shows the pack's texts in the language that it is set to."""
    if old(page):
        pytest.skip("this frontend does not show the Chinese texts of packs")
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    page.wait_for_timeout(500)
    page.reload()
    started(page)
    load(page, json.loads(EXAMPLE.read_text(encoding="utf-8")))
    assert page.evaluate("LiteGraph.registered_node_types.FGAttnPatch.title") == "FG-Attn 稀疏注意力"
    inputs = page.evaluate("""app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                              .widgets.map(w => w.label)""")
    assert "阈值" in inputs and "实时调节" in inputs

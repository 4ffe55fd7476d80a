"""ComfyUI's page in headless Chromium, and what a user does on it."""

import contextlib
import importlib.util
import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)
MISSING = [
    name
    for name, have in (("Chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
    if not have
]


def settings(vue):
    """Of the page: no tours and no warnings; the Vue renderer or the canvas."""
    return {
        "Comfy.TutorialCompleted": True,
        "Comfy.Workflow.ShowMissingModelsWarning": False,
        "Comfy.Validation.Workflows": True,
        "Comfy.UseNewMenu": "Top",
        "Comfy.Minimap.Visible": False,
        "Comfy.VueNodes.Enabled": vue,
    }


@contextlib.contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url, vue):
    """The page at an address, in a profile of its own; an error in its console fails the test."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.route(lambda asked: not asked.startswith(url), lambda route: route.fulfill(json={}))
    page = context.new_page()
    page.vue, page.errors = vue, []
    page.on("console", lambda m: page.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    started(page)
    yield page
    context.close()
    assert not page.errors, page.errors


def started(page):
    page.wait_for_function("window.app?.graph && window.app.extensionManager")
    page.wait_for_timeout(1000)
    page.errors.clear()  # those of the page's own start
    page.keyboard.press("Escape")


def load(page, graph):
    """Load a workflow and bring the FG-Attn nodes into view."""
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_function("app.graph._nodes.some(n => n.comfyClass === 'FGAttnTiming' && n.widgets?.length)")
    page.keyboard.press("Escape")
    page.evaluate("""() => { const [x, y] = app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch').pos;
        const at = app.canvas.ds; at.scale = 0.7; at.offset = [200 - x, 200 - y];
        app.canvas.setDirty(true, true); }""")
    page.wait_for_selector(".fgattn-presets")
    page.wait_for_timeout(500)


def value(page, name):
    return page.evaluate(
        """name => app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch')
                            .widgets.find(w => w.name === name).value""",
        name,
    )


def slider(page, name, share):
    """Put the mouse on a slider of the patch node and drag it to a share of its length."""
    if page.vue:
        thumbs = page.locator(f"[data-node-id='{patch_id(page)}'] [role=slider]")
        box = thumbs.nth(["threshold", "warmup_steps"].index(name)).locator("xpath=..").bounding_box()
    else:
        box = page.evaluate(
            """name => {
            const node = app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch');
            const widget = node.widgets.find(w => w.name === name);
            const [x, y] = app.canvasPosToClientPos([node.pos[0] + 15, node.pos[1] + widget.last_y]);
            const scale = app.canvas.ds.scale;
            return {x, y, width: scale * (node.size[0] - 30), height: scale * 20}; }""",
            name,
        )
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.3, y)
    page.mouse.down()
    for part in (0.4, 0.5, share):
        page.mouse.move(box["x"] + box["width"] * part, y, steps=3)
    page.mouse.up()
    page.wait_for_timeout(400)


def patch_id(page):
    return page.evaluate("String(app.graph._nodes.find(n => n.comfyClass === 'FGAttnPatch').id)")


def text(page, selector=".fgattn-panel"):
    return page.locator(selector).first.inner_text()

// The only file that knows ComfyUI's page: registers the extension and puts the widgets on the nodes.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { hears, patchesOf, whileInGraph } from "./graph.js";
import { followSliders } from "./live.js";
import { createPanel } from "./panel.js";
import { createPresets } from "./presets.js";
import { createStore } from "./store.js";

const EVENT = "fgattn.progress";
const ROUTE = "/fgattn/runs"; // of the last message of this page's runs
const PANEL_HEIGHT = 440; // px
const PANEL_WIDTH = 420; // of a new node
const LEAST_WIDTH = 350; // of any: below it the table of runs is cut
const PRESETS_HEIGHT = 54;
const SERVER_TEXT = "$$node-text-preview"; // ComfyUI's own line; newer frontends drop it when the prompt ends
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const AFTER = 300; // ms until the page has done so
const store = createStore();

app.registerExtension({
  name: "fgattn.panel",

  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./panel.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener(EVENT, ({ detail }) => take(detail));
    api.addEventListener("reconnected", catchUp);
    if (api.clientId) catchUp();
    else api.addEventListener("status", catchUp, { once: true }); // brings the page its id
  },

  nodeCreated(node) {
    if (node.comfyClass === "FGAttnTiming") addPanel(node);
    if (node.comfyClass === "FGAttnPatch") {
      addPresets(node);
      followSliders(node, { running: (id) => store.running(id), send: sendSliders });
    }
  },
});

function take(message) {
  const reason = store.accept(message);
  if (reason) console.debug("FG-Attn: message ignored:", reason);
}

/** Fetch what was sent while nobody listened: after loading, and when a lost connection is back. */
async function catchUp() {
  const open = store.open();
  try {
    const answer = await api.fetchApi(`${ROUTE}?client=${encodeURIComponent(api.clientId ?? "")}`);
    if (!answer.ok) return;
    const messages = await answer.json();
    messages.forEach(take);
    store.stop(open.filter((run) => !messages.some((message) => message?.run === run))); // the server restarted
  } catch (error) {
    console.debug("FG-Attn: no runs from before:", error);
  }
}

function addPanel(node) {
  const panel = createPanel({ copy: (text) => navigator.clipboard.writeText(text), save: download });
  addWidget(node, "fgattn_panel", panel.root, PANEL_HEIGHT);
  widen(node);
  whileInGraph(node, (signal) => {
    let frame = 0;
    const draw = () => {
      frame = 0;
      const patches = patchesOf(node);
      panel.show(store.runs((id) => hears(patches, id)));
    };
    const schedule = () => {
      frame ||= requestAnimationFrame(draw); // many events, one drawing
    };
    store.subscribe(schedule, signal);
    signal.addEventListener("abort", () => cancelAnimationFrame(frame), { once: true });
    schedule();
  });
}

/** A new node is as wide as the panel needs; one of a saved workflow keeps its width unless the panel is cut. */
function widen(node) {
  const { computeSize, onConfigure } = node;
  node.computeSize = function (...given) {
    const size = computeSize.apply(this, given);
    size[0] = Math.max(size[0], LEAST_WIDTH);
    return size;
  };
  node.onConfigure = function (...given) {
    const result = onConfigure?.apply(this, given);
    if (this.size[0] < LEAST_WIDTH) this.setSize([LEAST_WIDTH, this.size[1]]);
    return result;
  };
  node.setSize([Math.max(node.size[0], PANEL_WIDTH), Math.max(node.size[1], node.computeSize()[1])]);
}

async function sendSliders(values) {
  const body = JSON.stringify({ client: api.clientId, ...values });
  const answer = await api.fetchApi("/fgattn/sliders", { method: "POST", body });
  if (!answer.ok) console.debug("FG-Attn: slider not taken:", await answer.text());
}

function addPresets(node) {
  const row = document.createElement("div");
  const line = document.createElement("div");
  line.className = "fgattn-status";
  row.append(createPresets(node), line);
  addWidget(node, "fgattn_presets", row, PRESETS_HEIGHT, PRESETS_HEIGHT);
  whileInGraph(node, (signal) => {
    const own = new Set([String(node.id)]);
    const draw = () => {
      const last = store.runs((id) => hears(own, id)).at(-1);
      const free = last && last.state !== "running" && !node.widgets.some((w) => w.name === SERVER_TEXT);
      line.textContent = free ? last.headline : "";
    };
    store.subscribe(draw, signal);
    for (const name of ENDS) api.addEventListener(name, () => setTimeout(draw, AFTER), { signal });
  });
}

/** A widget that is neither saved with the workflow nor sent with the prompt. */
function addWidget(node, name, element, minimum, maximum) {
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false, hideOnZoom: false, margin: 5, getMinHeight: () => minimum,
    ...(maximum && { getMaxHeight: () => maximum }),
  });
  widget.serialize = false;
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

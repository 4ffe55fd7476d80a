// The extension on a page that is just large enough: what it puts on nodes, and what it leaves behind.

import assert from "node:assert/strict";
import { register } from "node:module";
import { test } from "node:test";
import { sample } from "./sample.mjs";

class Element extends EventTarget {
  constructor(tag) {
    super();
    Object.assign(this, { tag, children: [], attributes: {}, dataset: {}, own: "",
      style: { setProperty: (name, value) => { this.style[name] = value; } } });
  }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; }
  setAttribute(name, value) { this.attributes[name] = value; }
  get textContent() { return this.own + this.children.map((c) => c.textContent ?? c).join(" "); }
  set textContent(text) { this.own = text; }
  find(test) { return [...(test(this) ? [this] : []), ...this.children.flatMap((c) => c.find?.(test) ?? [])]; }
}

const served = { messages: [], asked: [], ok: true }; // what /fgattn/runs answers
const api = Object.assign(new EventTarget(), { clientId: undefined, async fetchApi(route) {
  served.asked.push(route);
  if (served.messages instanceof Error) throw served.messages;
  return { ok: served.ok, json: async () => served.messages };
} });
const page = globalThis.fgattnPage = { api, app: { registerExtension(e) { page.extension = e; } } };
globalThis.document = { head: new Element("head"), createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag) };
const frames = [];
globalThis.requestAnimationFrame = (draw) => frames.push(draw);
globalThis.cancelAnimationFrame = (number) => { frames[number - 1] = null; };
const draw = () => frames.splice(0).filter(Boolean).map((f) => f()).length;

const hooks = `export async function resolve(name, context, next) {
  const part = name.match(/scripts\\/(app|api)\\.js$/)?.[1];
  const source = "data:text/javascript,export const " + part + " = globalThis.fgattnPage." + part;
  return part ? { url: source, shortCircuit: true } : next(name, context);
}`;
register(`data:text/javascript,${encodeURIComponent(hooks)}`);
await import("../../web/js/fgattn.js");
page.extension.setup();

function send(event) {
  page.api.dispatchEvent(Object.assign(new Event("fgattn.progress"), { detail: event }));
}

/** A node as LiteGraph makes it; `add` puts it into the graph. */
function create(comfyClass, id, inputs = []) {
  const node = { comfyClass, id, mode: 0, inputs: inputs.map(() => ({ type: "MODEL" })), widgets: [
    { name: "threshold", value: 1 }, { name: "warmup_steps", value: 2 }], getInputNode: (slot) => inputs[slot],
    isInputConnected: (slot) => slot < inputs.length,
  size: [140, 66], computeSize: () => [140, 506], setSize(size) { this.size = size; },
  addDOMWidget(name, type, element, options) {
    const widget = { name, element, options };
    this.widgets.push(widget);
    return widget;
  } };
  page.extension.nodeCreated(node);
  return node;
}

const patch = create("FGAttnPatch", 3);
const text = (node) => node.widgets.at(-1).element.textContent;

test("a new timing node fits its panel, a saved one keeps a width that does", () => {
  const node = create("FGAttnTiming", 50);
  assert.deepEqual(node.size, [420, 506]);
  for (const [saved, shown] of [[370, 370], [200, 350]]) {
    node.size = [saved, 790];
    node.onConfigure();
    assert.deepEqual(node.size, [shown, 790]);
  }
  assert.deepEqual(create("FGAttnPatch", 51).size, [140, 66]);
});

test("one stylesheet; widgets are neither saved nor sent", () => {
  assert.equal(document.head.children.length, 1);
  const timing = create("FGAttnTiming", 5, [patch]);
  assert.deepEqual([patch, timing].map((n) => n.widgets.at(-1).name), ["fgattn_presets", "fgattn_panel"]);
  for (const { serialize, options } of [patch, timing].map((n) => n.widgets.at(-1))) {
    assert.deepEqual([serialize, options.serialize], [false, false]);
  }
  assert.equal(create("KSampler", 6).widgets.length, 2);
});

test("presets move the sliders", () => {
  const [fast] = patch.widgets.at(-1).element.find((e) => e.tag === "button" && e.textContent === "fast");
  fast.dispatchEvent(new Event("click"));
  assert.deepEqual(patch.widgets.slice(0, 2).map((w) => w.value), [2, 1]);
});

test("the panel shows its node's runs, one drawing for many events, and survives nonsense", () => {
  const timing = create("FGAttnTiming", 5, [patch]);
  timing.onAdded();
  draw();
  assert.match(text(timing), /No run yet/);
  for (let step = 0; step < 1000; step += 1) send(sample({ step: step % 4, headline: `step ${step}` }));
  for (const bad of [undefined, null, "x", { version: 99 }, sample({ calls: 1 })]) send(bad);
  send(sample({ node: "8", run: "z", headline: "of another node" }));
  assert.equal(draw(), 1);
  assert.match(text(timing), /step 999/);
  assert.doesNotMatch(text(timing), /another/);
  const [spoken] = timing.widgets.at(-1).element.find((e) => e.attributes["aria-live"] === "polite");
  assert.equal(spoken.textContent, "running, reused steps");
  timing.onRemoved();
});

test("a removed node and a copy that never came into a graph draw nothing more", () => {
  const gone = Array.from({ length: 1000 }, (_, i) => create("FGAttnTiming", i, [patch]));
  gone.slice(0, 500).forEach((node) => node.onAdded());
  gone.slice(0, 500).forEach((node) => node.onRemoved());
  assert.equal(draw(), 0);
  send(sample({ run: "b" }));
  assert.equal(draw(), 0);
});

test("a panel that comes later shows the runs so far", () => {
  const timing = create("FGAttnTiming", 9, [patch]);
  timing.onAdded();
  draw();
  assert.match(text(timing), /sparse: 30 % of scores/);
  assert.equal(timing.widgets.at(-1).element.find((e) => e.tag === "tr").length, 1 + 2);
  timing.onRemoved();
});

const settled = () => new Promise((resolve) => { setTimeout(resolve); });

/** Say something that the page hears of its connection, and wait until it has acted. */
async function connection(event) {
  api.dispatchEvent(new Event(event));
  await settled();
}

test("a page that was loaded asks once for its runs, when it knows its id", async () => {
  assert.deepEqual(served.asked, []);
  api.clientId = "tab 1";
  served.messages = [sample({ node: "31", run: "old", state: "done", headline: "of before the reload" })];
  await connection("status");
  await connection("status");
  assert.deepEqual(served.asked, ["/fgattn/runs?client=tab%201"]);
  const timing = create("FGAttnTiming", 32, [create("FGAttnPatch", 31)]);
  timing.onAdded();
  draw();
  assert.match(text(timing), /of before the reload/);
  timing.onRemoved();
});

test("after a lost connection the panel shows the last message, and goes on", async () => {
  const timing = create("FGAttnTiming", 42, [create("FGAttnPatch", 41)]);
  timing.onAdded();
  const run = (changes) => sample({ node: "41", run: "long", ...changes });
  send(run({ step: 1, headline: "before" }));
  served.messages = [run({ step: 3, headline: "meanwhile" })];
  await connection("reconnected");
  assert.equal(draw(), 1);
  assert.match(text(timing), /meanwhile/);
  send(run({ step: 4, headline: "after" }));
  draw();
  assert.match(text(timing), /after/);
  served.messages = [run({ step: 4, state: "done", headline: "its end" })]; // which was missed
  await connection("reconnected");
  send(run({ step: 4, headline: "late" }));
  draw();
  assert.match(text(timing), /its end/);
  timing.onRemoved();
});

test("a server that restarted knows nothing: the run is shown as stopped", async () => {
  const timing = create("FGAttnTiming", 52, [create("FGAttnPatch", 51)]);
  timing.onAdded();
  send(sample({ node: "51", run: "lost" }));
  served.messages = [];
  await connection("reconnected");
  draw();
  assert.match(text(timing), /stopped, step 3 of 4/);
  timing.onRemoved();
});

test("answers that are none change nothing", async () => {
  const timing = create("FGAttnTiming", 62, [create("FGAttnPatch", 61)]);
  timing.onAdded();
  send(sample({ node: "61", run: "kept", headline: "still here" }));
  for (const [ok, messages] of [[false, null], [true, null], [true, { a: 1 }], [true, [null, 7, {}, sample({ run: "kept",
    node: "61", heat: 1 })]], [true, new Error("no server")]]) {
    Object.assign(served, { ok, messages });
    await connection("reconnected");
  }
  draw();
  assert.match(text(timing), /still here/);
  timing.onRemoved();
});

test("10 000 events and odd heat maps: one drawing, nothing breaks", () => {
  const timing = create("FGAttnTiming", 72, [create("FGAttnPatch", 71)]);
  timing.onAdded();
  for (let i = 0; i < 10_000; i += 1) send(sample({ node: "71", run: `r${i % 7}`, heat: ["", "?", "AAA", "AAECAwQF"][i % 4] }));
  assert.equal(draw(), 1);
  assert.match(text(timing), /density/);
  timing.onRemoved();
});

test("the patch node says what its last run did, unless ComfyUI's own line still does", async () => {
  const node = create("FGAttnPatch", 30);
  node.onAdded();
  const [line] = node.widgets.at(-1).element.find((e) => e.className === "fgattn-status");
  send(sample({ node: "30", run: "s1" }));
  assert.equal(line.textContent, "");
  node.widgets.push({ name: "$$node-text-preview" });
  send(sample({ node: "30", run: "s1", state: "done" }));
  assert.equal(line.textContent, "");
  node.widgets.pop();
  page.api.dispatchEvent(new Event("execution_success"));
  await new Promise((done) => setTimeout(done, 400));
  assert.equal(line.textContent, "sparse: 30 % of scores");
  node.onRemoved();
  send(sample({ node: "30", run: "s2" }));
  assert.equal(line.textContent, "sparse: 30 % of scores");
});

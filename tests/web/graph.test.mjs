import assert from "node:assert/strict";
import { test } from "node:test";
import { hears, patchesOf, whileInGraph } from "../../web/js/graph.js";
import { PRESETS, applyPreset } from "../../web/js/presets.js";

let made = 0;

/** A node whose inputs are [type, origin] pairs, as LiteGraph has them. */
function node(comfyClass, inputs = [], more = {}) {
  made += 1;
  return { id: made, comfyClass, mode: 0, ...more,
    inputs: inputs.map(([type]) => ({ type })), isInputConnected: () => true, getInputNode: (slot) => inputs[slot][1] };
}

test("the nearest patch upstream, through other nodes and reroutes", () => {
  const far = node("FGAttnPatch");
  const near = node("FGAttnPatch", [["MODEL", far]]);
  const lora = node("LoraLoader", [["MODEL", near], ["CLIP", node("CLIPLoader")]]);
  const timing = node("FGAttnTiming", [["MODEL", node("Reroute", [["*", lora]])], ["LATENT", node("KSampler")]]);
  assert.deepEqual([...patchesOf(timing)], [String(near.id)]);
});

test("a bypassed patch is passed by; two models give two", () => {
  const one = node("FGAttnPatch");
  const two = node("FGAttnPatch");
  const off = node("FGAttnPatch", [["MODEL", two]], { mode: 4 });
  assert.deepEqual([...patchesOf(node("FGAttnTiming", [["MODEL", one], ["MODEL", off]]))].sort(),
    [String(one.id), String(two.id)].sort());
});

test("no patch: hears nothing; a subgraph's border: hears all", () => {
  const none = patchesOf(node("FGAttnTiming", [["MODEL", node("UNETLoader")]]));
  assert.equal(hears(none, "3"), false);
  assert.equal(patchesOf(node("FGAttnTiming", [["MODEL", null]])), null);
  assert.equal(patchesOf(node("FGAttnTiming", [["MODEL", { id: -10 }]])), null);
  assert.equal(patchesOf(node("FGAttnTiming", [["MODEL", node("Sub", [], { subgraph: {} })]])), null);
  assert.equal(hears(null, "3"), true);
  assert.equal(hears(new Set(["7"]), "12:7"), true);
  assert.equal(hears(new Set(["7"]), "7:12"), false);
});

test("a node listens while it is in a graph, and never twice", () => {
  const signals = [];
  const one = { onAdded: () => "kept", onRemoved: () => "too" };
  whileInGraph(one, (signal) => signals.push(signal));
  assert.equal(signals.length, 0); // a copy for the clipboard
  assert.equal(one.onAdded(), "kept");
  assert.equal(one.onRemoved(), "too");
  one.onAdded();
  one.onAdded();
  assert.deepEqual(signals.map((s) => s.aborted), [true, true, false]);
  one.onRemoved();
  assert.ok(signals[2].aborted);
  whileInGraph({ graph: {} }, (signal) => signals.push(signal));
  assert.equal(signals.length, 4);
});

test("a loop in the graph ends", () => {
  const a = node("Reroute");
  a.inputs = [{ type: "*" }];
  a.getInputNode = () => a;
  assert.equal(patchesOf(node("FGAttnTiming", [["MODEL", a]])).size, 0);
});

test("a preset moves the sliders and calls their callbacks, nothing else", () => {
  const calls = [];
  const widget = (name, value) => ({ name, value, callback: (v) => calls.push([name, v]) });
  const patch = { widgets: [widget("threshold", 5), widget("tile_keys", "16"), widget("warmup_steps", 9)] };
  applyPreset(patch, "fast");
  assert.deepEqual(patch.widgets.map((w) => w.value), [2, "16", 1]);
  assert.deepEqual(calls, [["threshold", 2], ["warmup_steps", 1]]);
  applyPreset({}, "quality"); // a node without widgets
  assert.deepEqual(Object.values(PRESETS).map((p) => p.threshold), [0.7, 1, 2]);
});

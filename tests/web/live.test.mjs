import assert from "node:assert/strict";
import { mock, test } from "node:test";
import { executionIds, followSliders } from "../../web/js/live.js";

/** A patch node with its widgets, in a root graph. */
function patch(live) {
  const calls = [];
  const widget = (name, value) => ({ name, value, callback: (v) => { calls.push([name, v]); return "kept"; } });
  const node = { id: 3, calls, widgets: [widget("threshold", 1), widget("warmup_steps", 2), widget("live", live),
    widget("tile_keys", "16")] };
  node.graph = { nodes: [node] };
  return node;
}

function move(node, name, value) {
  const widget = node.widgets.find((w) => w.name === name);
  widget.value = value;
  return widget.callback(value);
}

test("many moves are one message with both values, and the widget's own callback is called through", () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  const node = patch(true);
  const sent = [];
  followSliders(node, { running: (id) => id === "3", send: (message) => sent.push(message) });
  for (const value of [1.2, 1.4, 1.6]) assert.equal(move(node, "threshold", value), "kept");
  move(node, "warmup_steps", 4);
  move(node, "tile_keys", "8");
  assert.deepEqual(sent, []);
  mock.timers.tick(1000);
  assert.deepEqual(sent, [{ node: "3", threshold: 1.6, warmup_steps: 4 }]);
  assert.equal(node.calls.length, 5);
  move(node, "threshold", 1.6); // back to a value of before counts as well
  mock.timers.tick(1000);
  assert.equal(sent.length, 2);
  mock.timers.reset();
});

for (const [name, live, running, graph] of [["the switch is off", false, true, true],
  ["nothing runs", true, false, true], ["the node was removed", true, true, false]]) {
  test(`nothing is sent when ${name}`, () => {
    mock.timers.enable({ apis: ["setTimeout"] });
    const node = patch(live);
    followSliders(node, { running: () => running, send: () => assert.fail("sent") });
    if (!graph) node.graph = null;
    move(node, "threshold", 2);
    mock.timers.tick(1000);
    mock.timers.reset();
  });
}

test("a node without widgets is left alone", () => followSliders({}, {}));

test("inside subgraphs a node has an id for every place it runs in", () => {
  const root = { nodes: [] };
  const inner = { rootGraph: root, nodes: [] };
  const middle = { rootGraph: root, nodes: [{ id: 5, subgraph: inner }] };
  middle.nodes[0].graph = middle;
  root.nodes.push({ id: 1, subgraph: middle, graph: root }, { id: 2, subgraph: middle, graph: root },
    { id: 9, subgraph: inner, graph: root });
  root.subgraphs = new Map([["a", middle], ["b", inner]]);
  assert.deepEqual(executionIds({ id: 7, graph: inner }), ["9:7", "1:5:7", "2:5:7"]);
  assert.deepEqual(executionIds({ id: 7, graph: root }), ["7"]);
  assert.deepEqual(executionIds({ id: 7, graph: null }), []);
});

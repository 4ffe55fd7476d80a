import assert from "node:assert/strict";
import { test } from "node:test";
import { KEPT, createStore } from "../../web/js/store.js";
import { sample } from "./sample.mjs";

const any = () => true;
const names = (store, wanted = any) => store.runs(wanted).map((run) => run.run);

test("an event updates its run in place", () => {
  const store = createStore();
  assert.equal(store.accept(sample({ step: 1 })), null);
  store.accept(sample({ run: "b" }));
  store.accept(sample({ step: 2 }));
  assert.deepEqual(store.runs(any).map((r) => [r.run, r.step]), [["a", 2], ["b", 3]]);
});

test("late news of a finished run are ignored", () => {
  const store = createStore();
  store.accept(sample({ state: "done" }));
  assert.match(store.accept(sample({ state: "running" })), /over/);
  assert.equal(store.runs(any)[0].state, "done");
});

test("a malformed event changes nothing and wakes nobody", () => {
  const store = createStore();
  store.accept(sample());
  let calls = 0;
  store.subscribe(() => { calls += 1; }, new AbortController().signal);
  for (const bad of [undefined, null, {}, sample({ timeline: "x" }), sample({ state: "?" })]) {
    assert.equal(typeof store.accept(bad), "string");
  }
  assert.equal(calls, 0);
  assert.deepEqual(names(store), ["a"]);
});

test("only the nodes that are asked for", () => {
  const store = createStore();
  store.accept(sample({ node: "3", run: "a" }));
  store.accept(sample({ node: "4", run: "b" }));
  assert.deepEqual(names(store, (id) => id === "4"), ["b"]);
});

test("10 000 events of 1 000 runs and 100 nodes: memory stays bounded, each is told once", () => {
  const store = createStore();
  const end = new AbortController();
  let calls = 0;
  store.subscribe(() => { calls += 1; }, end.signal);
  const started = performance.now();
  for (let i = 0; i < 10_000; i += 1) {
    const run = Math.floor(i / 10);
    store.accept(sample({ node: String(run % 100), run: `r${run}`, step: i % 10 }));
  }
  assert.ok(performance.now() - started < 5000);
  assert.equal(calls, 10_000);
  let kept = 0;
  for (let node = 0; node < 100; node += 1) kept += store.runs((id) => id === String(node)).length;
  assert.ok(kept <= 20 * KEPT && kept > 0, `${kept} runs`);
  assert.equal(store.runs(any).length, KEPT);
  assert.equal(store.runs(any).at(-1).run, "r999");
});

test("an aborted signal leaves no listener", () => {
  const store = createStore();
  for (let i = 0; i < 1000; i += 1) {
    const end = new AbortController();
    store.subscribe(() => assert.fail("called after its end"), end.signal);
    end.abort();
  }
  const dead = new AbortController();
  dead.abort();
  store.subscribe(() => assert.fail("called after its end"), dead.signal);
  assert.equal(store.listening, 0);
  store.accept(sample());
});

test("a listener may leave while it is told", () => {
  const store = createStore();
  const end = new AbortController();
  let others = 0;
  store.subscribe(() => end.abort(), end.signal);
  store.subscribe(() => { others += 1; }, new AbortController().signal);
  store.accept(sample());
  store.accept(sample());
  assert.equal(others, 2);
  assert.equal(store.listening, 1);
});

test("a restart of the server ends the runs that it does not know", () => {
  const store = createStore();
  store.accept(sample({ run: "a", state: "done" }));
  store.accept(sample({ run: "b" }));
  store.accept(sample({ run: "c", node: "4" }));
  let calls = 0;
  store.subscribe(() => { calls += 1; }, new AbortController().signal);
  assert.deepEqual(store.open(), ["b", "c"]);
  store.stop([]);
  assert.equal(calls, 0);
  store.stop(["a", "c", "z"]);
  assert.equal(calls, 1);
  assert.deepEqual(store.runs(any).map((r) => [r.run, r.state]), [["a", "done"], ["b", "running"], ["c", "interrupted"]]);
  assert.deepEqual(store.open(), ["b"]);
});

test("a node is running while its last run is", () => {
  const store = createStore();
  assert.equal(store.running("3"), false);
  store.accept(sample());
  assert.equal(store.running("3"), true);
  assert.equal(store.running("12:3"), false);
  store.accept(sample({ state: "done" }));
  assert.equal(store.running("3"), false);
  store.accept(sample({ run: "b" }));
  assert.equal(store.running("3"), true);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import * as view from "../../web/js/view.js";
import { chosen, sample, samples } from "./sample.mjs";

const close = (a, b) => assert.ok(Math.abs(a - b) < 1e-9, `${a} is not ${b}`);

test("times are short", () => {
  assert.deepEqual([0, 9.994, 42, 1234, 12_345, 61_000, 119_600].map(view.duration),
    ["0 ms", "9.99 ms", "42 ms", "1.23 s", "12.3 s", "1 min 1 s", "2 min 0 s"]);
});

test("a gain is said both ways, and not claimed without a comparison", () => {
  assert.deepEqual([2.9, 0.5, null].map(view.gain), ["2.90x faster", "2.00x slower", "-"]);
});

test("shares add up, attention by kind", () => {
  const share = view.shares(sample());
  close(share.attention, 900 / 2500);
  close(share.planning, 100 / 2500);
  close(share.attention + share.planning + share.rest, 1);
  assert.deepEqual(share.parts.map((p) => p.part), ["warm-up", "sparse", "reused", "planning", "rest"]);
  close(share.parts.at(-1).x + share.parts.at(-1).width, 1);
  assert.equal(view.shares(sample({ timeline: [] })), null);
});

test("marks that say more than the step took do not overflow the bar", () => {
  const step = { index: 0, total: 10, attention: 12, planning: 3, kind: "sparse" };
  const share = view.shares(sample({ timeline: [step] }));
  close(share.attention + share.planning + share.rest, 1);
  assert.ok(share.parts.every((p) => p.width >= 0 && p.x + p.width <= 1 + 1e-9));
});

test("timeline: stacks from the bottom, inside the box, at the step's place", () => {
  const { parts, labels, last } = view.timeline(sample());
  assert.equal(last, 4);
  assert.deepEqual(labels.map((l) => l.x), [0, 0.25, 0.5]);
  assert.ok(parts.every((p) => p.y >= 0 && p.height > 0 && p.y + p.height <= 1 + 1e-9));
  const second = parts.filter((p) => p.x === 0.25);
  assert.deepEqual(second.map((p) => p.part), ["sparse", "planning", "rest"]);
  close(second[0].y + second[0].height, 1);
  close(second[1].y + second[1].height, second[0].y);
  assert.match(labels[1].label, /^step 2, sparse: 900 ms, attention 200 ms, planning 100 ms, est. error 7 %$/);
});

test("timeline: a step that compiles does not flatten the others", () => {
  const steps = [9000, 100, 100, 100].map((total, index) => ({ index, total, attention: 0, planning: 0, kind: "dense" }));
  const { parts, labels } = view.timeline(sample({ timeline: steps }));
  assert.ok(parts[1].height > 0.3);
  assert.match(labels[0].label, /cut off/);
  assert.doesNotMatch(labels[1].label, /cut off/);
});

test("timeline: the last 100 of 300 steps, and steps of no time", () => {
  const steps = Array.from({ length: 100 }, (_, i) => ({ index: 200 + i, total: 0, attention: 0, planning: 0, kind: "dense" }));
  const { labels, first, last } = view.timeline(sample({ steps: 300, timeline: steps }));
  assert.deepEqual([first, last], [201, 300]);
  assert.ok(labels.every((l) => l.x >= 0 && l.x + l.width <= 1 + 1e-9));
});

test("heat: a column for each step, a row for each block, strength relative to the densest cell", () => {
  const { rows, shades, least, most } = view.heat(sample());
  assert.deepEqual(rows.map((r) => r.label),
    ["unknown block: 10 % of scores", "block 3: 40 % of scores, est. error 6.1 %"]);
  assert.deepEqual(rows.map((r) => [r.y, r.height]), [[0, 0.5], [0.5, 0.5]]);
  assert.deepEqual(shades.map((s) => s.strength), [0.12, 1, 0.12 + 0.88 * 8 / 16]); // bytes 26 and 27, 128, 77
  assert.deepEqual([least, most], [25 / 254, 127 / 254]);
  assert.equal(shades[0].path, "M0.2500 0.0000h0.2500v0.5000h-0.2500zM0.5000 0.0000h0.2500v0.5000h-0.2500z");
  assert.equal(shades[1].path, "M0.2500 0.5000h0.2500v0.5000h-0.2500z");
});

test("heat: the last steps, where there are fewer columns; nothing where there is nothing", () => {
  const last = view.heat(sample({ heat: btoa(String.fromCharCode(0, 128)) }));
  assert.deepEqual(last.shades, [{ strength: 1, path: "M0.5000 0.5000h0.2500v0.5000h-0.2500z" }]);
  for (const heat of ["", "not base64", "AAA", "AA==", btoa("\0".repeat(6))]) {
    assert.deepEqual(view.heat(sample({ heat })).shades, [], heat);
  }
  assert.deepEqual(view.heat(sample({ blocks: [], timeline: [] })), { rows: [], shades: [], least: null, most: null });
  const level = view.heat(sample({ heat: btoa("\x01".repeat(6)) }));
  assert.deepEqual([level.shades.length, level.shades[0].strength, level.least, level.most], [1, 1, 0, 0]);
});

test("heat: 60 blocks and 60 steps are at most 17 paths", () => {
  const blocks = Array.from({ length: 60 }, (_, block) => ({ block, density: 0.3, estimated_error: null }));
  const step = sample().timeline[0];
  const steps = Array.from({ length: 60 }, (_, index) => ({ ...step, index }));
  const bytes = Array.from({ length: 3600 }, (_, i) => 1 + i % 255);
  const { shades } = view.heat(sample({ blocks, timeline: steps, steps: 60, heat: btoa(String.fromCharCode(...bytes)) }));
  assert.ok(shades.length <= 17);
  assert.equal(shades.map((s) => s.path.split("M").length - 1).reduce((a, b) => a + b), 3600);
});

test("estimated errors: a bar under each step that has one, and words with two digits", () => {
  const { bars, least, most } = view.estimatedErrors(sample());
  assert.deepEqual(bars.map((b) => [b.x, b.width]), [[0.25, 0.25], [0.5, 0.25]]);
  assert.deepEqual([bars[0].height, bars[1].y, least, most], [1, 1 - 0.052 / 0.07, 0.052, 0.07]);
  assert.equal(bars[1].label, "step 3: est. error 5.2 %");
  assert.equal(view.estimatedErrors(sample({ timeline: sample().timeline.slice(0, 1) })), null);
  assert.deepEqual([0.0612, 0.00431, 0.12345, 1e-9, 0, null].map(view.percent),
    ["6.1 %", "0.43 %", "12 %", "<0.01 %", "0 %", "-"]);
});

test("runs side by side: what differs in each row, what is shared once", () => {
  const other = sample({ settings: chosen({ strength: 2, tail: false }), density: null, speedup: null,
    estimated_error: null, timeline: [], state: "done" });
  const { rows, shared } = view.runTable([sample(), other]);
  assert.equal(shared, "tiles 128x16, cells order, warm-up 1 of 4 steps");
  assert.deepEqual(rows, [["1", "threshold 1, tail on", "750 ms", "2.00x faster", "30 %", "6.1 %", "running"],
    ["2", "threshold 2, tail off", "-", "-", "-", "-", "done"]]);
  assert.ok(rows.every((row) => row.length === view.RUN_COLUMNS.length));
  assert.equal(view.runTable([sample()]).rows[0][1], "-");
  const moved = sample({ settings: chosen({ method: "a, b", moved: true, moved_threshold: 1.4, moved_warmup_steps: 0 }) });
  assert.equal(view.runTable([sample(), moved]).rows[1][1], "a, b 1, moved to threshold 1.4 and warm-up 0");
});

test("what is spoken stays the same from step to step of a kind", () => {
  const spoken = [2, 3].map((n) => view.announcement(sample({ step: n, headline: `${n}` })));
  assert.equal(spoken[0], spoken[1]);
  assert.match(view.announcement(sample({ state: "interrupted" })), /^stopped, step 3 of 4: sparse/);
  assert.match(view.announcement(sample({ state: "failed" })), /^failed, step 3 of 4: sparse/);
});

test("text has every step, block and outcome", () => {
  const text = view.asText(sample());
  for (const part of ["sparse: 30 % of scores", "8 calls: sparse", "step 3, reused", "block 3: 40 %", "est. error 6.1 %"]) {
    assert.ok(text.includes(part), part);
  }
  for (const one of samples) assert.doesNotMatch(view.asText(one), /undefined|NaN|null/);
});

test("CSV: one line a step and a block, text with commas quoted", () => {
  const lines = view.asCsv([sample(), sample({ settings: chosen({ method: 'a "b"' }) })]).split("\r\n");
  assert.equal(lines.length, 1 + 2 * 5 + 1);
  assert.equal(lines[1], '1,"threshold 1, tiles 128x16, cells order, tail on, warm-up 1 of 4 steps",step,0,warm-up,1000,500,0,,,1,1');
  assert.equal(lines[2], '1,"threshold 1, tiles 128x16, cells order, tail on, warm-up 1 of 4 steps",step,1,sparse,900,200,100,,0.07,1,1');
  assert.equal(lines.at(-2), '2,"a ""b"" 1, tiles 128x16, cells order, tail on, warm-up 1 of 4 steps",block,3,,,,,0.4,0.061,,');
});

test("sliders that moved during the run: a mark, a line of text, and every step's values in the CSV", () => {
  const run = sample({ sliders: [{ step: 0, threshold: 1, warmup_steps: 1 }, { step: 2, threshold: 1.4, warmup_steps: 0 }] });
  assert.deepEqual(view.moves(run), [{ x: 0.5, label: "from step 3: threshold 1.4, warm-up 0" }]);
  assert.deepEqual(view.moves(sample()), []);
  assert.match(view.asText(run), /from step 3: threshold 1.4, warm-up 0/);
  const cells = view.asCsv([run]).split("\r\n").slice(1, 4).map((line) => line.split(",").slice(-2));
  assert.deepEqual(cells, [["1", "1"], ["1", "1"], ["1.4", "0"]]);
  const late = sample({ timeline: run.timeline, sliders: run.sliders.slice(1) }); // more moves than are told
  assert.match(view.asCsv([late]), /,step,0,.*,,,\r\n/);
});

test("densities that hardly differ look alike", () => {
  const { shades } = view.heat(sample({ heat: btoa(String.fromCharCode(0, 0, 20, 21, 20, 21)) }));
  assert.equal(shades.length, 2);
  assert.ok(shades.every((shade) => shade.strength > 0.9));
});

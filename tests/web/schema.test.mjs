import assert from "node:assert/strict";
import { test } from "node:test";
import { problem } from "../../web/js/schema.js";
import { sample, samples } from "./sample.mjs";

test("samples are snapshots", () => {
  for (const one of samples) assert.equal(problem(one), null);
});

const malformed = {
  "nothing": undefined, "null": null, "text": "x", "a list": [], "no field": {},
  "another version": sample({ version: 2 }), "text for a number": sample({ total: "1" }),
  "not finite": sample({ total: NaN }), "a fraction for a count": sample({ step: 1.5 }),
  "unknown state": sample({ state: "paused" }), "null where a number must be": sample({ total: null }),
  "no list": sample({ blocks: {} }), "a hole in a list": sample({ calls: [null] }),
  "unknown kind": sample({ timeline: [{ index: 0, total: 1, attention: 1, planning: 0, kind: "x" }] }),
  "a field too many": sample({ extra: 1 }), "a field in the prototype": sample({ toString: 1 }),
};
for (const [name, value] of Object.entries(malformed)) {
  test(`refused: ${name}`, () => assert.equal(typeof problem(value), "string"));
}

test("every field is needed", () => {
  for (const field of Object.keys(sample())) {
    const less = sample();
    delete less[field];
    assert.match(problem(less), new RegExp(field));
  }
});

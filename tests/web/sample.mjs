// A snapshot to test with; `node sample.mjs` prints a few of them as JSON.

export function chosen(changes = {}) {
  return { method: "threshold", strength: 1, tile_queries: 128, tile_keys: 16, order: "cells", tail: true,
    warmup_steps: 1, steps: 4, reuse_steps: 1, moved: false, moved_threshold: null, moved_warmup_steps: null, ...changes };
}

export function sample(changes = {}) {
  return {
    version: 3, node: "3", run: "a", state: "running", headline: "sparse: 30 % of scores",
    settings: chosen(), tokens: 4992, step: 3, steps: 4, total: 2500,
    dense_call: 9.5, sparse_call: 4.75, speedup: 2, density: 0.3,
    estimated_error: 0.061,
    timeline: [
      { index: 0, total: 1000, attention: 500, planning: 0, kind: "warm-up", estimated_error: null },
      { index: 1, total: 900, attention: 200, planning: 100, kind: "sparse", estimated_error: 0.07 },
      { index: 2, total: 600, attention: 200, planning: 0, kind: "reused", estimated_error: 0.052 },
    ],
    blocks: [{ block: -1, density: 0.1, estimated_error: null }, { block: 3, density: 0.4, estimated_error: 0.061 }],
    calls: [{ outcome: "sparse", text: "sparse", number: 8 },
      { outcome: "warm_up", text: "warm-up step", number: 4 }],
    heat: btoa(String.fromCharCode(0, 0, 26, 128, 27, 77)), // steps 1 to 3, two blocks each
    sliders: [{ step: 0, threshold: 1, warmup_steps: 1 }],
    ...changes,
  };
}

export const samples = [
  sample(),
  sample({ state: "done", step: 4, sliders: [{ step: 0, threshold: 1, warmup_steps: 1 },
    { step: 2, threshold: 1.4, warmup_steps: 0 }] }),
  sample({ timeline: [], blocks: [], calls: [], dense_call: null, sparse_call: null, speedup: null, density: null,
    estimated_error: null, heat: "" }),
];

if (process.argv[1]?.endsWith("sample.mjs")) console.log(JSON.stringify(samples));

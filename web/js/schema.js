// The message that the server sends while a run samples. fgattn/snapshot.py defines it; a test compares.

export const VERSION = 2;

// int, number, string; "?" may be null; [..] one of these strings; {list} of objects.
export const SCHEMA = {
  "version": "int",
  "node": "string",
  "run": "string",
  "state": ["running", "done", "error", "interrupted"],
  "headline": "string",
  "settings": "string",
  "tokens": "int",
  "step": "int",
  "steps": "int",
  "total": "number",
  "dense_call": "number?",
  "sparse_call": "number?",
  "speedup": "number?",
  "density": "number?",
  "error": "number?",
  "timeline": {"list": {
    "index": "int", "total": "number", "attention": "number", "planning": "number",
    "kind": ["warm-up", "dense", "sparse", "reused"], "error": "number?"
  }},
  "blocks": {"list": {"block": "int", "density": "number", "error": "number?"}},
  "calls": {"list": {"outcome": "string", "number": "int"}},
  "heat": "string",
  "sliders": {"list": {"step": "int", "threshold": "number", "warmup_steps": "int"}}
};

/** Why a value is not a snapshot, or null. */
export function problem(value) {
  return wrong(value, SCHEMA, "snapshot") ?? (value.version === VERSION ? null : `version ${value.version}`);
}

function wrong(value, shape, where) {
  if (typeof shape === "string") {
    if (value === null && shape.endsWith("?")) return null;
    const fits = { int: Number.isSafeInteger, number: Number.isFinite, string: (v) => typeof v === "string" };
    return fits[shape.replace("?", "")](value) ? null : `${where} is no ${shape}`;
  }
  if (Array.isArray(shape)) return shape.includes(value) ? null : `${where} is not one of ${shape.join(", ")}`;
  if (shape.list) {
    if (!Array.isArray(value)) return `${where} is no list`;
    return firstWrong(value.map((item, i) => [item, shape.list, `${where}[${i}]`]));
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) return `${where} is no object`;
  const fields = Object.keys(shape);
  const unknown = Object.keys(value).find((name) => !fields.includes(name));
  if (unknown !== undefined) return `${where}.${unknown} is unknown`;
  return firstWrong(fields.map((name) => [value[name], shape[name], `${where}.${name}`]));
}

function firstWrong(checks) {
  for (const [value, shape, where] of checks) {
    const found = wrong(value, shape, where);
    if (found) return found;
  }
  return null;
}

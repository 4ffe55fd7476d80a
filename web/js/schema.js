// The message that the server sends while a run samples. fgattn/show/snapshot.py defines it; a test compares.

export const VERSION = 3;

// int, number, string, bool; "?" may be null; [..] one of these strings; {list} of objects.
export const SCHEMA = {
  "version": "int",
  "node": "string",
  "run": "string",
  "state": ["running", "done", "failed", "interrupted"],
  "headline": "string",
  "settings": {
    "method": "string", "strength": "number", "tile_queries": "int", "tile_keys": "int", "order": "string",
    "tail": "bool", "warmup_steps": "int", "steps": "int", "reuse_steps": "int",
    "moved": "bool", "moved_threshold": "number?", "moved_warmup_steps": "int?"
  },
  "tokens": "int",
  "step": "int",
  "steps": "int",
  "total": "number",
  "dense_call": "number?",
  "sparse_call": "number?",
  "speedup": "number?",
  "density": "number?",
  "estimated_error": "number?",
  "timeline": {"list": {
    "index": "int", "total": "number", "attention": "number", "planning": "number",
    "kind": ["warm-up", "dense", "sparse", "reused"], "estimated_error": "number?"
  }},
  "blocks": {"list": {"block": "int", "density": "number", "estimated_error": "number?"}},
  "calls": {"list": {"outcome": "string", "text": "string", "number": "int"}},
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
    const fits = { int: Number.isSafeInteger, number: Number.isFinite, string: (v) => typeof v === "string",
      bool: (v) => typeof v === "boolean" };
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

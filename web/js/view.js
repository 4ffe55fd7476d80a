// What a panel shows of a run: numbers, words and rectangles, without a page.

/** Time in ms as people read it. */
export function duration(ms) {
  const seconds = Math.round(ms / 1000);
  if (ms >= 60_000) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 10 || ms === 0 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(2)} ms`;
}

/**
 * A share with two digits, "-" for null: "0.43 %", "6.1 %", "12 %"; "<0.01 %" for less, "0 %" for nothing at all.
 * The server writes the same text (`percent` in fgattn/show/text.py).
 */
export function percent(share) {
  if (share === null) return "-";
  return share > 0 && share < 1e-4 ? "<0.01 %" : `${Number((100 * share).toPrecision(2))} %`;
}

/** "2.90x faster", "1.20x slower" or "-". */
export function gain(speedup) {
  if (!speedup) return "-";
  return speedup >= 1 ? `${speedup.toFixed(2)}x faster` : `${(1 / speedup).toFixed(2)}x slower`;
}

/** Mean time of steps of a kind, or null. */
export function meanStep(run, kinds) {
  const steps = run.timeline.filter((step) => kinds.includes(step.kind));
  return steps.length ? steps.reduce((sum, step) => sum + step.total, 0) / steps.length : null;
}

/**
 * Shares of the finished steps' time, null before the first step: attention, planning and rest, and `parts`, a
 * stacked bar of them with attention by kind: {part, x, width}.
 */
export function shares(run) {
  const total = run.timeline.reduce((sum, step) => sum + step.total, 0);
  if (!total) return null;
  const byPart = new Map();
  const add = (part, time) => byPart.set(part, (byPart.get(part) ?? 0) + time);
  for (const step of run.timeline) add(step.kind, step.attention);
  for (const step of run.timeline) add("planning", step.planning);
  const known = Math.max(total, [...byPart.values()].reduce((sum, time) => sum + time, 0));
  const planning = byPart.get("planning") / known;
  const rest = known - [...byPart.values()].reduce((sum, time) => sum + time, 0);
  byPart.set("rest", rest);
  const parts = [];
  let x = 0;
  for (const [part, time] of byPart) {
    parts.push({ part, x, width: time / known });
    x += time / known;
  }
  return { attention: 1 - planning - rest / known, planning, rest: rest / known, parts };
}

const OUTLIER = 3; // a step above this multiple of the median is cut off: compilation, mostly

/**
 * Bars of the step timeline, one stack a step, in a box of 1 x 1 with y downwards.
 * Every part: {x, y, width, height, part: a kind or "planning" or "rest"}; every step: {x, width, label}.
 */
export function timeline(run) {
  const steps = run.timeline;
  const first = steps.length ? steps[0].index : 0;
  const slots = Math.max(1, run.steps - first, steps.length);
  const totals = steps.map((step) => step.total).sort((a, b) => a - b);
  const highest = totals.at(-1) || 1;
  const limit = Math.min(highest, OUTLIER * (totals[totals.length >> 1] || highest)) * 1.02;
  const width = 1 / slots;
  const parts = [];
  const labels = [];
  for (const step of steps) {
    const x = Math.min(slots - 1, Math.max(0, step.index - first)) * width;
    const stack = [[step.kind, step.attention], ["planning", step.planning],
      ["rest", Math.max(0, step.total - step.attention - step.planning)]];
    let bottom = 0;
    for (const [part, time] of stack) {
      const top = Math.min(1, bottom + time / limit);
      if (top > bottom) parts.push({ x, y: 1 - top, width, height: top - bottom, part });
      bottom = top;
    }
    const cut = step.total > limit ? ", bar cut off" : "";
    const estimate = step.estimated_error === null ? "" : `, est. error ${percent(step.estimated_error)}`;
    labels.push({ x, width, label: `step ${step.index + 1}, ${step.kind}: ${duration(step.total)}, attention `
      + `${duration(step.attention)}, planning ${duration(step.planning)}${estimate}${cut}` });
  }
  return { parts, labels, limit, first: first + 1, last: first + slots };
}

/**
 * Bars of the estimated error, one for each step that has one, in a box of 1 x 1 under the timeline, with the least
 * and the greatest of them; null if there is none.
 */
export function estimatedErrors(run) {
  const known = run.timeline.map((step, i) => [step, i]).filter(([step]) => step.estimated_error !== null);
  if (!known.length) return null;
  const { labels } = timeline(run);
  const values = known.map(([step]) => step.estimated_error);
  const most = Math.max(...values);
  const bars = known.map(([step, i]) => {
    const height = most ? Math.max(0, step.estimated_error / most) : 0;
    return { x: labels[i].x, width: labels[i].width, y: 1 - height, height,
      label: `step ${step.index + 1}: est. error ${percent(step.estimated_error)}` };
  });
  return { bars, least: Math.min(...values), most };
}

const SHADES = 16;
const FAINTEST = 0.12; // strength of the sparsest cell
const LEAST_SPAN = 25; // in bytes, a tenth of all scores: smaller differences shall not look like gaps

/**
 * Density by step, under the timeline, and block, from the top, in a box of 1 x 1. The densest cell has strength 1;
 * cells of a strength are one SVG path. `rows` has a label for each block; `least` and `most` are null without cells.
 */
export function heat(run) {
  const count = run.blocks.length;
  const height = 1 / Math.max(1, count);
  const rows = run.blocks.map((b, i) => ({ y: i * height, height, label: `${blockName(b.block)}: `
    + `${percent(b.density)} of scores${b.estimated_error === null ? "" : `, est. error ${percent(b.estimated_error)}`}` }));
  const bytes = decoded(run.heat);
  const { labels } = timeline(run);
  const columns = Math.min(labels.length, count ? Math.floor(bytes.length / count) : 0);
  const used = bytes.slice(0, columns * count).filter((byte) => byte > 0);
  const least = used.length ? Math.min(...used) : 1;
  const most = used.length ? Math.max(...used) : 1;
  const paths = new Map();
  labels.slice(labels.length - columns).forEach(({ x, width }, column) => {
    for (let row = 0; row < count; row += 1) {
      const byte = bytes[column * count + row];
      if (!byte) continue;
      const shade = Math.round(SHADES * (1 - (most - byte) / Math.max(most - least, LEAST_SPAN)));
      const cell = `M${x.toFixed(4)} ${(row * height).toFixed(4)}h${width.toFixed(4)}v${height.toFixed(4)}`
        + `h${(-width).toFixed(4)}z`;
      paths.set(shade, (paths.get(shade) ?? "") + cell);
    }
  });
  const shades = [...paths].map(([shade, path]) => ({ strength: FAINTEST + (1 - FAINTEST) * shade / SHADES, path }));
  const density = (byte) => (used.length ? (byte - 1) / 254 : null);
  return { rows, shades, least: density(least), most: density(most) };
}

/** Bytes of base64, none if it is not. */
function decoded(text) {
  if (text.length % 4 || !/^[A-Za-z0-9+/]*={0,2}$/.test(text)) return [];
  return [...atob(text)].map((letter) => letter.charCodeAt(0));
}

/** Moves of the sliders during the run: {x, label}, in the timeline's box. */
export function moves(run) {
  const { first, last } = timeline(run);
  return run.sliders.slice(1).filter((s) => s.step + 1 >= first).map((s) => ({
    x: (s.step + 1 - first) / (last + 1 - first), label: `from step ${s.step + 1}: ${sliderText(s)}` }));
}

function sliderText({ threshold, warmup_steps }) {
  return `threshold ${threshold}, warm-up ${warmup_steps}`;
}

/** Where the sliders stood in a step, or undefined. */
function slidersAt(run, step) {
  return run.sliders.findLast((s) => s.step <= step);
}

export function blockName(block) {
  return block < 0 ? "unknown block" : `block ${block}`;
}

/** Where a run stands, in words. */
export function status(run) {
  const where = `step ${run.step} of ${run.steps}`;
  return { running: where, done: `done, ${where}`, failed: `failed, ${where}`,
    interrupted: `stopped, ${where}` }[run.state];
}

/** What a screen reader is told; changes seldom, so that it may be spoken. */
export function announcement(run) {
  if (run.state !== "running") return `${status(run)}: ${run.headline}`;
  const last = run.timeline.at(-1);
  return last ? `running, ${last.kind} steps` : "running";
}

export const RUN_COLUMNS = ["run", "settings", "sparse step", "attention", "density", "est. error", "state"];

/**
 * Words for a run's settings, from their fields, in the order that people read them; empty where one has no effect.
 * `describe` in fgattn/show/text.py has the same words.
 */
const SETTINGS = [
  (s) => `${s.method} ${short(s.strength)}`,
  (s) => `tiles ${s.tile_queries}x${s.tile_keys}`,
  (s) => `${s.order} order`,
  (s) => `tail ${s.tail ? "on" : "off"}`,
  (s) => `warm-up ${s.warmup_steps} of ${s.steps} steps`,
  (s) => (s.reuse_steps > 1 ? `plans serve ${s.reuse_steps} steps` : ""),
  (s) => (s.moved ? `moved to ${movedTo(s)}` : ""),
];

function movedTo({ moved_threshold: threshold, moved_warmup_steps: warmup }) {
  const now = [];
  if (threshold !== null) now.push(`threshold ${short(threshold)}`);
  if (warmup !== null) now.push(`warm-up ${warmup}`);
  return now.join(" and ") || "and fro";
}

/** A number with at most six digits. */
function short(number) {
  return `${Number(number.toPrecision(6))}`;
}

/** A run's settings as one line; those of `which` only, if it is given. */
export function settingsText(settings, which = SETTINGS) {
  return which.map((words) => words(settings)).filter(Boolean).join(", ");
}

/** The table of runs: rows of cells, with the settings that differ, and the settings that all share. */
export function runTable(runs) {
  const same = (words) => runs.every((run) => words(run.settings) === words(runs[0].settings));
  const differing = SETTINGS.filter((words) => !same(words));
  const rows = runs.map((run, i) => {
    const step = meanStep(run, ["sparse", "reused"]);
    return [`${i + 1}`, settingsText(run.settings, differing) || "-",
      step === null ? "-" : duration(step), gain(run.speedup),
      percent(run.density), percent(run.estimated_error), run.state];
  });
  return { rows, shared: settingsText(runs[0].settings, SETTINGS.filter(same)) };
}

/** A run as text. */
export function asText(run) {
  const lines = [run.headline, `${status(run)}, ${duration(run.total)}, ${run.tokens} tokens`,
    settingsText(run.settings)];
  const part = shares(run);
  if (part) {
    lines.push(`time: attention ${percent(part.attention)}, planning ${percent(part.planning)}, `
      + `rest ${percent(part.rest)}`);
  }
  lines.push(...moves(run).map((move) => move.label));
  lines.push("", ...run.calls.map((c) => `${c.number} calls: ${c.text}`));
  lines.push("", ...timeline(run).labels.map((l) => l.label));
  if (run.blocks.length) lines.push("", ...heat(run).rows.map((row) => row.label));
  return lines.join("\n");
}

/** Runs as CSV, one line a step, then one line a block; times in ms. */
export function asCsv(runs) {
  const rows = [["run", "settings", "part", "index", "kind", "total_ms", "attention_ms", "planning_ms", "density",
    "est_error", "threshold", "warmup_steps"]];
  runs.forEach((run, i) => {
    const start = [i + 1, settingsText(run.settings)];
    for (const s of run.timeline) {
      const at = slidersAt(run, s.index);
      rows.push([...start, "step", s.index, s.kind, s.total, s.attention, s.planning, "", s.estimated_error ?? "",
        at?.threshold ?? "", at?.warmup_steps ?? ""]);
    }
    for (const b of run.blocks) rows.push([...start, "block", b.block, "", "", "", "", b.density,
      b.estimated_error ?? "", "", ""]);
  });
  return rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function csvCell(value) {
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

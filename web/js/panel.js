// Draws runs into an element, with plain DOM and SVG.

import * as view from "./view.js";

const SVG = "http://www.w3.org/2000/svg";
const KINDS = [["warm-up", "warm-up"], ["dense", "dense"], ["sparse", "sparse"], ["reused", "reused plan"],
  ["planning", "planning"], ["rest", "rest of the step"]];

/**
 * A panel; `show(runs)` draws, the last run is the one in focus.
 * @param {{copy: (text: string) => Promise<void>, save: (name: string, text: string) => void}} actions
 */
export function createPanel(actions) {
  const root = element("section", "fgattn-panel");
  root.setAttribute("aria-label", "FG-Attn run statistics");
  const body = element("div", "fgattn-body", root);
  const live = element("div", "fgattn-spoken", root);
  live.setAttribute("role", "status");
  live.setAttribute("aria-live", "polite");
  const bar = element("div", "fgattn-buttons", root);
  const copy = button("copy as text", bar);
  const save = button("save as CSV", bar);
  let runs = [];

  copy.addEventListener("click", async () => {
    try {
      await actions.copy(view.asText(runs.at(-1)));
      say("copied");
    } catch {
      say("the browser does not allow copying");
    }
  });
  save.addEventListener("click", () => actions.save("fgattn.csv", view.asCsv(runs)));

  function say(text) {
    if (live.textContent !== text) live.textContent = text;
  }

  function show(shown) {
    runs = shown;
    const run = runs.at(-1);
    copy.disabled = save.disabled = !run;
    if (!run) {
      body.replaceChildren(element("p", "fgattn-faint", null,
        "No run yet. Statistics appear here while the model samples."));
      return;
    }
    say(view.announcement(run));
    body.replaceChildren(title(run), steps(run), shareBar(run), estimatedErrors(run), blocks(run), calls(run), table(runs));
  }

  show([]);
  return { root, show };
}

function title(run) {
  const head = element("header", "fgattn-head");
  head.dataset.state = run.state;
  element("strong", "", head, run.headline);
  const progress = element("span", "fgattn-faint", head, `${view.status(run)}, ${view.duration(run.total)}`);
  progress.title = view.settingsText(run.settings);
  return head;
}

function steps(run) {
  const layout = view.timeline(run);
  const figure = chart("time per step", `0 to ${view.duration(layout.limit)}`);
  const svg = picture(figure, 72);
  for (const p of layout.parts) rectangle(svg, spaced(p), `fgattn-${p.part}`);
  for (const l of layout.labels) rectangle(svg, { ...l, y: 0, height: 1 }, "fgattn-hover", l.label);
  for (const move of view.moves(run)) {
    rectangle(svg, { x: move.x - 0.002, width: 0.004, y: 0, height: 1 }, "fgattn-move", move.label);
  }
  ends(figure, `step ${layout.first}`, `${layout.last}`);
  const kinds = new Set(layout.parts.map((p) => p.part));
  const legend = element("div", "fgattn-legend", figure);
  for (const [kind, text] of KINDS.filter(([k]) => kinds.has(k))) {
    element("i", `fgattn-key fgattn-${kind}`, legend);
    element("span", "", legend, text);
  }
  const moved = view.moves(run).at(-1);
  if (moved) element("div", "fgattn-faint", figure, `sliders moved, ${moved.label}`);
  return figure;
}

function shareBar(run) {
  const share = view.shares(run);
  const figure = chart("whole run", share
    ? `attention ${view.percent(share.attention)}, planning ${view.percent(share.planning)}, `
      + `rest ${view.percent(share.rest)}` : "no step finished yet");
  const svg = picture(figure, 10);
  for (const p of share?.parts ?? []) {
    rectangle(svg, { ...p, y: 0, height: 1 }, `fgattn-${p.part}`, `${p.part} ${view.percent(p.width)}`);
  }
  return figure;
}

function estimatedErrors(run) {
  const layout = view.estimatedErrors(run);
  if (!layout) return element("div", "");
  const figure = chart("estimated error", `mean ${view.percent(run.estimated_error)}, steps ${view.percent(layout.least)} to `
    + view.percent(layout.most));
  const svg = picture(figure, 24);
  for (const bar of layout.bars) rectangle(svg, spaced(bar), "fgattn-estimated-error", bar.label);
  return figure;
}

function blocks(run) {
  if (!run.blocks.length) return element("div", "");
  const { rows, shades, least, most } = view.heat(run);
  const names = `${view.blockName(run.blocks[0].block)} at the top`
    + (rows.length > 1 ? `, ${run.blocks.at(-1).block} at the bottom` : "");
  const range = most === null ? "" : `, ${view.percent(least)} to ${view.percent(most)}`;
  const figure = chart("density", names + range);
  const svg = picture(figure, Math.min(120, Math.max(24, 6 * rows.length)));
  for (const { strength, path } of shades) {
    const cells = document.createElementNS(SVG, "path");
    cells.setAttribute("d", path);
    cells.setAttribute("class", "fgattn-heat");
    cells.style.setProperty("--strength", strength.toFixed(3));
    svg.append(cells);
  }
  for (const row of rows) rectangle(svg, { ...row, x: 0, width: 1 }, "fgattn-hover", row.label);
  return figure;
}

function calls(run) {
  const list = element("ul", "fgattn-calls");
  list.setAttribute("aria-label", "attention calls by outcome");
  element("li", "fgattn-faint", list, "calls");
  for (const { text, number } of run.calls) {
    const item = element("li", "", list);
    element("b", "", item, `${number} `);
    item.append(text);
  }
  return list;
}

function table(runs) {
  const { rows, shared } = view.runTable(runs);
  const all = element("table", "fgattn-runs");
  const caption = element("caption", "", all, "last runs");
  element("span", "fgattn-faint", caption, ` ${shared}`);
  const head = element("tr", "", element("thead", "", all));
  for (const name of view.RUN_COLUMNS) element("th", "", head, name).scope = "col";
  const body = element("tbody", "", all);
  rows.forEach((cells, i) => {
    const row = element("tr", i === rows.length - 1 ? "fgattn-now" : "", body);
    for (const text of cells) element("td", "", row, text);
  });
  return all;
}

function chart(name, note) {
  const figure = element("figure", "");
  const caption = element("figcaption", "", figure);
  element("span", "", caption, name);
  element("span", "fgattn-faint", caption, note);
  figure.setAttribute("aria-label", `${name}: ${note}`);
  return figure;
}

/** A picture whose coordinates run from 0 to 1. */
function picture(figure, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.style.height = `${height}px`;
  figure.append(svg);
  return svg;
}

function rectangle(svg, { x, y, width, height }, kind, label) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x, y, width, height })) {
    rect.setAttribute(name, value.toFixed(5));
  }
  rect.setAttribute("class", kind);
  if (label) {
    const tip = document.createElementNS(SVG, "title");
    tip.textContent = label;
    rect.append(tip);
  }
  svg.append(rect);
  return rect;
}

/** A rectangle with a gap on both sides. */
function spaced(rect) {
  return { ...rect, x: rect.x + rect.width * 0.04, width: rect.width * 0.92 };
}

function ends(figure, first, last) {
  const axis = element("div", "fgattn-axis fgattn-faint", figure);
  element("span", "", axis, first);
  element("span", "", axis, last);
}

function button(text, parent) {
  const made = element("button", "", parent, text);
  made.type = "button";
  return made;
}

function element(tag, name, parent, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

// Buttons that move the sliders of FGAttnPatch; nothing is stored.

export const PRESETS = {
  quality: { threshold: 0.7, warmup_steps: 3 },
  balanced: { threshold: 1.0, warmup_steps: 2 },
  fast: { threshold: 2.0, warmup_steps: 1 },
};

/** Set a node's widgets to a preset. */
export function applyPreset(node, name) {
  for (const [input, value] of Object.entries(PRESETS[name])) {
    const widget = (node.widgets ?? []).find((w) => w.name === input);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value);
  }
  node.setDirtyCanvas?.(true, true);
}

/** The row of buttons. */
export function createPresets(node) {
  const row = document.createElement("div");
  row.className = "fgattn-buttons fgattn-presets";
  row.setAttribute("role", "group");
  row.setAttribute("aria-label", "presets");
  for (const [name, values] of Object.entries(PRESETS)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.title = `threshold ${values.threshold}, warm-up ${values.warmup_steps}`;
    button.addEventListener("click", () => applyPreset(node, name));
    row.append(button);
  }
  return row;
}

// Which FGAttnPatch nodes a timing node hears of: those that its models come through.

const BYPASSED = 4;

/**
 * Ids of the nearest patch nodes upstream, or null where the graph does not tell (a subgraph's border).
 * @param node a LiteGraph node
 */
export function patchesOf(node) {
  const found = new Set();
  const seen = new Set();
  const waiting = [node];
  while (waiting.length) {
    const here = waiting.pop();
    if (seen.has(here)) continue;
    seen.add(here);
    if (here !== node && here.comfyClass === "FGAttnPatch" && here.mode !== BYPASSED) {
      found.add(String(here.id));
      continue;
    }
    for (const [slot, input] of (here.inputs ?? []).entries()) {
      if (input.link == null || (input.type !== "MODEL" && input.type !== "*")) continue;
      const origin = here.getInputNode(slot);
      if (!origin || origin.subgraph) return null;
      waiting.push(origin);
    }
  }
  return found;
}

/** Whether an execution id ("7", or "12:7" inside a subgraph) is one of these nodes. */
export function hears(patches, id) {
  return patches === null || patches.has(id.split(":").at(-1));
}

// A node in its graph: when it is there, and which FGAttnPatch nodes its models come through.

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
      if ((input.type !== "MODEL" && input.type !== "*") || !here.isInputConnected(slot)) continue;
      const origin = here.getInputNode(slot);
      if (!origin || origin.subgraph || origin.id < 0) return null; // the border nodes have negative ids
      waiting.push(origin);
    }
  }
  return found;
}

/** Whether an execution id ("7", or "12:7" inside a subgraph) is one of these nodes. */
export function hears(patches, id) {
  return patches === null || patches.has(id.split(":").at(-1));
}

/**
 * Run `start(signal)` when the node comes into a graph; the signal aborts when it leaves. Copies of a node that
 * ComfyUI makes for the clipboard or on the way into a subgraph never come into one.
 */
export function whileInGraph(node, start) {
  let controller = null;
  const enter = () => {
    controller?.abort();
    controller = new AbortController();
    start(controller.signal);
  };
  after(node, "onAdded", enter);
  after(node, "onRemoved", () => controller?.abort());
  if (node.graph) enter();
}

/** Call `also` after a method of the node, and keep what that returns. */
function after(node, method, also) {
  const original = node[method];
  node[method] = function (...args) {
    const result = original?.apply(this, args);
    also();
    return result;
  };
}

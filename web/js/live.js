// Moves of the sliders that act on the run that is going on, if the node's live switch is on.

const SLIDERS = ["threshold", "warmup_steps"];
const PAUSE = 150; // ms without a move before the values go to the server

/**
 * Follow a node's sliders.
 * @param node a LiteGraph node of FGAttnPatch
 * @param {{running: (id: string) => boolean, send: (message: object) => void}} page
 */
export function followSliders(node, { running, send }) {
  const find = (name) => (node.widgets ?? []).find((widget) => widget.name === name);
  let timer = 0;
  const tell = () => {
    if (!find("live")?.value) return;
    const [threshold, warmup_steps] = SLIDERS.map((name) => find(name).value);
    for (const id of executionIds(node).filter(running)) send({ node: id, threshold, warmup_steps });
  };
  for (const widget of SLIDERS.map(find).filter(Boolean)) {
    const original = widget.callback;
    widget.callback = function (...args) {
      clearTimeout(timer);
      timer = setTimeout(tell, PAUSE);
      return original?.apply(this, args);
    };
  }
}

/** Ids that a node has while it runs: "7"; inside subgraphs "12:7", one for each place the subgraph is used in. */
export function executionIds(node) {
  if (!node.graph) return [];
  const root = node.graph.rootGraph ?? node.graph;
  if (node.graph === root) return [String(node.id)];
  const graphs = [root, ...root.subgraphs.values()];
  const hosts = graphs.flatMap((graph) => graph.nodes.filter((host) => host.subgraph === node.graph));
  return hosts.flatMap((host) => executionIds(host).map((id) => `${id}:${node.id}`));
}

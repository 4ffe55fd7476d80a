// The last runs, kept in memory for every panel of the page.

import { problem } from "./schema.js";

export const KEPT = 6; // runs of a node
const NODES = 20; // nodes that are remembered

/** A store: `accept` takes events, `runs` gives snapshots, `subscribe` tells of changes. */
export function createStore() {
  const byNode = new Map(); // node id -> Map of run id -> snapshot, both oldest first
  const listeners = new Set();
  const all = (wanted = () => true) => [...byNode].filter(([node]) => wanted(node)).flatMap(([, runs]) => [...runs.values()]);
  const tell = () => [...listeners].forEach((listener) => listener());

  return {
    /** Take in an event; a malformed one or one of a finished run changes nothing. Returns why, or null. */
    accept(event) {
      const reason = problem(event);
      if (reason) return reason;
      const runs = byNode.get(event.node) ?? new Map();
      const known = runs.get(event.run);
      if (known && known.state !== "running") return "the run is over";
      runs.set(event.run, { ...event, order: known?.order ?? nextOrder() });
      if (runs.size > KEPT) runs.delete(runs.keys().next().value);
      byNode.delete(event.node); // the node that was heard of last goes last
      byNode.set(event.node, runs);
      if (byNode.size > NODES) byNode.delete(byNode.keys().next().value);
      tell();
      return null;
    },

    /** Ids of the runs that are going on. */
    open() {
      return all().filter((run) => run.state === "running").map((run) => run.run);
    },

    /** Runs of which nothing more will be heard. */
    stop(ids) {
      for (const run of all()) {
        if (run.state === "running" && ids.includes(run.run)) byNode.get(run.node).set(run.run, { ...run, state: "interrupted" });
      }
      if (ids.length) tell();
    },

    /** Runs of the nodes that `wanted(id)` takes, oldest first, at most KEPT. */
    runs(wanted) {
      return all(wanted).sort((a, b) => a.order - b.order).slice(-KEPT);
    },

    /** Whether a node's last run is going on, as far as is known. */
    running(node) {
      return [...(byNode.get(node)?.values() ?? [])].at(-1)?.state === "running";
    },

    /** Call `listener` after every change, until the signal aborts. */
    subscribe(listener, signal) {
      if (signal.aborted) return;
      listeners.add(listener);
      signal.addEventListener("abort", () => listeners.delete(listener), { once: true });
    },

    /** Number of listeners; a removed node leaves none. */
    get listening() {
      return listeners.size;
    },
  };
}

let order = 0;

function nextOrder() {
  order += 1;
  return order;
}

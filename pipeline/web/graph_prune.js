"use strict";
// The graph as the page holds it, and how it is pruned: the same rules as pipeline/interp/circuits/graph_scores.py.

const KINDS = ["feature", "error", "token", "position", "position_0", "rest", "bias", "logit"];
const ALWAYS = new Set(["token", "logit"]);

// Numbers packed by Python, little-endian.
function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

// Rows of edges by target: start[t] up to start[t + 1] of `source` and `weight`.
function readGraph(data) {
  const n = data.nodes.id.length;
  const nodes = data.nodes.id.map((id, i) => {
    const node = { i };
    for (const key of Object.keys(data.nodes)) node[key] = data.nodes[key][i];
    node.kind = KINDS[node.kind];
    return node;
  });
  const source = unpack(data.edges.source, Uint16Array), weight = unpack(data.edges.weight, Float32Array);
  const start = new Uint32Array(n + 1), target = new Uint16Array(source.length);
  data.edges.counts.forEach((count, t) => {
    start[t + 1] = start[t] + count;
    target.fill(t, start[t], start[t + 1]);
  });
  const leaving = nodes.map(() => []);
  source.forEach((s, e) => leaving[s].push(e));
  // All that a target reads, what the page leaves out included.
  const total = new Float64Array(n), flow = new Float64Array(source.length);
  weight.forEach((w, e) => { total[target[e]] += Math.abs(w); });
  nodes.forEach((node, t) => { total[t] += node.outside_size; });
  weight.forEach((w, e) => {
    const node = nodes[target[e]];
    flow[e] = (Math.abs(w) / Math.max(total[target[e]], 1e-10)) * (node.influence + node.weight);
  });
  return { nodes, source, target, weight, start, leaving, total, flow, influenceTotal: data.influence_total };
}

// The value at which the sum of what is at least as large reaches the share of `all`, by default the sum of all, added
// up in the same order as the parts.
function cutoff(values, share, all = null) {
  const sorted = Float64Array.from(values).sort().reverse();
  all ??= sorted.reduce((a, b) => a + b, 0);
  let sum = 0;
  for (const value of sorted) {
    sum += value;
    if (sum / all >= share) return value;
  }
  return 0;
}

// How much of the outputs passes each edge when only some nodes are there: share of the target's input, times the
// target's own influence and probability.
function edgeScores(graph, mask) {
  const { nodes, source, target, weight } = graph, n = nodes.length;
  const share = new Float64Array(weight.length), sums = new Float64Array(n);
  const there = (e) => mask[source[e]] && mask[target[e]];
  weight.forEach((w, e) => { if (there(e)) sums[target[e]] += Math.abs(w); });
  weight.forEach((w, e) => { if (there(e)) share[e] = Math.abs(w) / Math.max(sums[target[e]], 1e-10); });
  let now = Float64Array.from(nodes, (node) => node.weight);
  const influence = Float64Array.from(now);
  for (let step = 0; step < n && now.some((v) => v > 0); step++) {
    const next = new Float64Array(n);
    share.forEach((v, e) => { if (v) next[source[e]] += v * now[target[e]]; });
    next.forEach((v, i) => { influence[i] += v; });
    now = next;
  }
  return share.map((v, e) => v * influence[target[e]]);
}

// -> { nodes, edges }: 1 where kept, at these shares of the influence.
function prune(graph, nodeShare, edgeShare) {
  const { nodes, source, target } = graph;
  const least = cutoff(nodes.map((node) => node.influence), nodeShare, graph.influenceTotal);
  const large = (node) => node.influence > 0 && node.influence >= least;
  const keep = Uint8Array.from(nodes, (node) => Number(large(node) || ALWAYS.has(node.kind)));
  const scores = edgeScores(graph, keep);
  const weakest = cutoff(scores, edgeShare);
  const edges = Uint8Array.from(scores, (score) => (score > 0 && score >= weakest ? 1 : 0));
  for (let changed = true; changed; ) {
    changed = false;
    const reads = new Uint8Array(nodes.length), read = new Uint8Array(nodes.length);
    edges.forEach((on, e) => { if (on) { reads[target[e]] = 1; read[source[e]] = 1; } });
    nodes.forEach((node, i) => {
      if (!keep[i] || ALWAYS.has(node.kind)) return;
      if (read[i] && (reads[i] || node.kind !== "feature")) return;
      keep[i] = 0;
      changed = true;
    });
    edges.forEach((on, e) => { if (on && !(keep[source[e]] && keep[target[e]])) edges[e] = 0; });
  }
  return { nodes: keep, edges };
}

"use strict";
// The panel: of the whole graph, of a node, of a group, of several nodes.

// Where a node stands, in a few letters.
function short(node) {
  const at = texts[node.position];
  if (node.kind === "feature" || node.kind === "error" || node.kind === "rest") return `L${node.layer} ${at}`;
  if (node.kind === "position_0") return `L${node.layer}`;
  return node.kind === "position" ? at : node.kind === "token" ? String(node.position) : "";
}
const counted = (n) => `${n} ${n === 1 ? "feature" : "features"}`;

function rowOf(item, weight, share, there = true) {
  const node = item.node;
  return {
    key: item.key, kind: node ? node.kind : "feature", name: node ? title(node) : item.label, weight, share, faint: !there,
    at: node ? short(node) : counted(item.members.length), about: node ? `${node.id}: ${where(node, data)}` : item.label,
  };
}
const asNode = (i) => ({ key: "n" + i, kind: graph.nodes[i].kind, node: graph.nodes[i], members: [i] });
const byWeight = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);

// What one or more targets read, each by its part: { rows by source, sums by kind, value }.
function inputs(item) {
  const byItem = new Map(), sums = new Map(), add = (kind, weight, source) => {
    if (!sums.has(kind)) sums.set(kind, { sum: 0, sources: new Set() });
    sums.get(kind).sum += weight;
    sums.get(kind).sources.add(source);
  };
  let value = 0, all = 0, outside = 0;
  for (const t of item.members) {
    const part = partOf(item, t), node = graph.nodes[t];
    value += part * node.value;
    all += part * graph.total[t];
    for (let e = graph.start[t]; e < graph.start[t + 1]; e++) {
      const from = itemOf.get(graph.source[e]) || asNode(graph.source[e]), weight = part * graph.weight[e];
      byItem.set(from.key, { from, weight: weight + (byItem.get(from.key)?.weight ?? 0) });
      add(graph.nodes[graph.source[e]].kind, weight, graph.source[e]);
    }
    if (node.outside_count) add("outside", part * node.outside_sum, -1);
    outside = Math.max(outside, node.outside_count);
  }
  const share = (weight) => Math.abs(weight) / Math.max(all, 1e-30);
  const rows = [...byItem.values()].map(({ from, weight }) => rowOf(from, weight, share(weight), items.includes(from)));
  const size = (kind) => (kind === "outside" ? outside : sums.get(kind).sources.size);
  const found = [...KINDS, "outside"].filter((kind) => sums.has(kind)).map((kind) => [kind, sums.get(kind).sum, size(kind)]);
  return { rows: rows.sort(byWeight), sums: found, value };
}

// The targets of a node, the one through which it has most influence first.
function outputsOf(i) {
  const found = graph.leaving[i].map((e) => {
    const target = graph.target[e], share = Math.abs(graph.weight[e]) / graph.total[target];
    return { row: rowOf(asNode(target), graph.weight[e], share, itemOf.has(target)), flow: graph.flow[e] };
  });
  return found.sort((a, b) => b.flow - a.flow).map(({ row }) => row);
}

function groupOutputs(item) {
  const rows = edges.filter((edge) => edge.from === item).map((edge) => {
    const all = edge.to.members.reduce((sum, t) => sum + partOf(edge.to, t) * graph.total[t], 0);
    return rowOf(edge.to, edge.weight, Math.abs(edge.weight) / Math.max(all, 1e-30));
  });
  return rows.sort(byWeight);
}

function inputParts(item, unit) {
  const { rows, sums, value } = inputs(item);
  const count = sums.reduce((sum, [, , one]) => sum + one, 0);
  const list = edgeList(rows, "Inputs", "share of all that it reads");
  return [list, section("What they add up to", `${count} sources`, account(sums, value, unit))];
}
const outputList = (rows) => edgeList(rows, "Outputs", "share of what the target reads");

const pinButton = (members) => button(members.every((i) => state.pinned.has(i)) ? "unpin" : "pin", pin, "p", "pin");
const closeButton = () => button("close", () => select(null), "Esc");

function nodePanel(i) {
  const node = graph.nodes[i], mine = groupOf(i), parts = [html("h2", {}, icon(node.kind), title(node))];
  parts.push(html("p", { class: "soft" }, told(node)[0]));
  parts.push(html("p", { class: "buttons" }, pinButton([i]), ...(mine ? groupButtons(i, mine) : []), closeButton()));
  parts.push(facts([
    ["activation", node.activation ? number(node.activation) : ""], [unitOf(node), number(node.value)],
    ["probability", node.probability ? percent(node.probability) : ""],
    ["influence", percent(node.influence / graph.influenceTotal), "Share of all influence on the outputs"],
    ["group", mine ? mine.name : ""],
  ]));
  if (node.kind === "feature") parts.push(...contextsOf(node));
  if (node.value !== null) parts.push(...inputParts(asNode(i), unitOf(node)));
  if (node.kind !== "logit") parts.push(outputList(outputsOf(i)));
  return parts;
}

function contextsOf(node) {
  const feature = data.features[`${node.layer}/${node.index}`];
  if (feature) return featureParts(feature, data.strings, node);
  const command = html("code", {}, `clt features features.ids=[${node.layer}/${node.index}]`);
  return [html("p", { class: "soft" }, "Its contexts are not on this page: ", command, ", and then clt graph again.")];
}

function groupButtons(i, mine) {
  const takeOut = () => {
    mine.members = mine.members.filter((member) => member !== i);
    state.groups = state.groups.filter((one) => one.members.length);
    remember();
    draw();
  };
  return [button("dissolve group", () => ungroup(state.groups.indexOf(mine))), button("take out", takeOut)];
}

function groupPanel(at) {
  const mine = state.groups[at], item = items.find((one) => one.key === "g" + at);
  const rename = (event) => {
    const name = event.target.value;
    if (name && name !== mine.name) mine.name = unlike(name);
    remember();
    draw();
  };
  const name = html("input", { value: mine.name, "aria-label": "name of the group", onchange: rename });
  const members = mine.members.map((i) => graph.nodes[i]);
  const parts = [html("h2", {}, name), html("p", { class: "buttons" }, pinButton(mine.members),
    button(mine.open ? "collapse" : "show its members", () => toggle(at)), button("dissolve", () => ungroup(at)), closeButton())];
  const one = (node) => line({ kind: node.kind, name: title(node), at: short(node) }, () => select("n" + node.i));
  parts.push(section("Members", "", html("ol", {}, ...members.map(one))));
  if (item && members.every((node) => node.value !== null)) parts.push(...inputParts(item, unitOf(members[0]) + ", mean"));
  if (item) parts.push(outputList(groupOutputs(item)));
  return parts;
}

function severalPanel() {
  const named = (event) => { if (event.key === "Enter") group(event.target.value); };
  const name = html("input", { placeholder: "name of the group", id: "group-name", onkeydown: named });
  const chosen = state.selected.map((key) => {
    const members = membersOf(key), [first] = members.map((i) => graph.nodes[i]);
    const mine = isGroup(key) ? state.groups[Number(key.slice(1))] : null;
    return line({ name: mine ? mine.name : title(first), at: mine ? counted(members.length) : short(first) }, () => select(key));
  });
  const make = button("group", () => group(name.value), "g", "make-group");
  const buttons = html("p", { class: "buttons" }, name, make, pinButton(state.selected.flatMap(membersOf)), closeButton());
  return [html("h2", {}, `${state.selected.length} chosen`), html("ol", {}, ...chosen), buttons];
}

function outputPart() {
  const outputs = graph.nodes.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
  const most = Math.max(...outputs.map((node) => node.probability));
  return html("ol", { class: "outputs" }, ...outputs.map((node) => line({
    key: "n" + node.i, name: plainToken(node.label), at: node.probability ? `logit ${signed(node.value)}` : "",
    bar: spread(node.probability, most), value: node.probability ? percent(node.probability) : signed(node.value),
  }, () => select("n" + node.i))));
}

function influencePart() {
  const best = items.filter((item) => item.kind === "feature" || item.box).sort((a, b) => b.influence - a.influence).slice(0, 10);
  const rows = best.map((item) => line({
    ...rowOf(item, 0), faint: false, bar: spread(item.influence, best[0].influence),
    value: percent(item.influence / graph.influenceTotal),
  }, () => select(item.key)));
  return section("Most influential", "share of all influence on the outputs", html("ol", {}, ...rows));
}

function pathPart() {
  const strongest = Math.max(...data.paths.map((path) => path.strength));
  const rows = data.paths.map((path, at) => line({
    name: path.nodes.map((i) => title(graph.nodes[i])).join(" › "), bar: spread(path.strength, strongest),
    value: percent(path.strength), on: state.path === at,
  }, () => follows(at)));
  return section("Strongest paths", "product of the shares along them", html("ol", { class: "paths" }, ...rows));
}

function scorePart() {
  const features = graph.nodes.filter((node, i) => node.kind === "feature" && pruned.nodes[i]).length;
  const kept = pruned.edges.reduce((a, b) => a + b, 0), shown = Math.min(state.d, edges.length);
  const left = `${features} of ${data.n_active} active features and ${kept} edges are left at these thresholds`;
  const scores = data.scores.map(([name, value, about]) => [name, number(value), about]);
  const said = html("p", { class: "soft" }, `${left}; ${shown} edges are drawn.`);
  return section("How much of the model this explains", "", facts(scores), said);
}

function groupPart() {
  const rows = state.groups.map((mine, at) =>
    line({ name: mine.name, at: counted(mine.members.length) + (mine.open ? ", shown" : "") }, () => select("g" + at)));
  return section("Groups", "", html("ol", {}, ...rows));
}

function overview() {
  const settings = html("details", {}, html("summary", {}, "Settings"), facts(data.settings));
  return [html("h2", {}, "Outputs"), outputPart(), influencePart(), data.paths.length && pathPart(), scorePart(),
    state.groups.length && groupPart(), settings].filter(Boolean);
}

function panel() {
  const place = $("panel"), [only] = state.selected;
  let parts;
  if (state.selected.length > 1) parts = severalPanel();
  else if (!only) parts = overview();
  else parts = (isGroup(only) ? groupPanel : nodePanel)(Number(only.slice(1)));
  place.replaceChildren(...parts);
  place.scrollTop = 0;
}

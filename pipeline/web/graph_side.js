"use strict";
// The panel's content and the controls, from the state of graph.js.

function rowOf(item, weight, share, there = true) {
  const node = item.node;
  return { key: item.key, kind: item.kind === "group" ? "feature" : item.kind, label: node ? title(node) : item.label, at: node ? short(node) : `${item.members.length} features`, weight, share, there, title: node ? `${node.id}: ${where(node, data)}` : item.label };
}
const short = (node) => (node.kind === "feature" || node.kind === "error" || node.kind === "rest" ? `L${node.layer} ${texts[node.position]}` : node.kind === "position" ? texts[node.position] : node.kind === "position_0" ? `L${node.layer}` : node.kind === "token" ? `${node.position}` : "");
const asNode = (i) => ({ key: "n" + i, kind: graph.nodes[i].kind, node: graph.nodes[i], members: [i] });

function walk(line) { select(line.key); }

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
  const rows = [...byItem.values()].map(({ from, weight }) => rowOf(from, weight, Math.abs(weight) / all, items.includes(from)));
  rows.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  return { rows, sums: [...KINDS, "outside"].filter((kind) => sums.has(kind)).map((kind) => [kind, sums.get(kind).sum, kind === "outside" ? outside : sums.get(kind).sources.size]), value };
}
function outputsOf(i) {
  const rows = graph.leaving[i].map((e) => rowOf(asNode(graph.target[e]), graph.weight[e], Math.abs(graph.weight[e]) / graph.total[graph.target[e]], itemOf.has(graph.target[e])));
  return rows.sort((a, b) => b.share * reach(b.key) - a.share * reach(a.key));
}
const reach = (key) => { const node = graph.nodes[Number(key.slice(1))]; return node.influence + node.weight; };

function inputParts(item, unit) {
  const { rows, sums, value } = inputs(item);
  const count = sums.reduce((sum, [, , one]) => sum + one, 0);
  return [edgeList(rows, "Inputs", "share of all that it reads", walk), html("section", {}, html("h3", {}, "What they add up to", html("small", {}, `${count} sources`)), account(sums, value, unit))];
}

function nodePanel(i) {
  const node = graph.nodes[i], feature = data.features[`${node.layer}/${node.index}`], target = node.value !== null, grouped = groupOf(i);
  const parts = [html("h2", {}, icon(node.kind), title(node)), html("p", { class: "soft" }, `${ONE[node.kind]}${node.kind === "feature" ? " " + node.index : ""}, ${where(node, data)}`)];
  parts.push(buttons(i, grouped));
  parts.push(facts([["activation", node.activation ? number(node.activation) : ""], [node.kind === "logit" ? "logit above the mean" : "pre-activation", target ? number(node.value) : ""], ["probability", node.probability ? percent(node.probability) : ""], ["influence", percent(node.influence / graph.influenceTotal), "Share of all influence on the outputs"], ["group", grouped ? grouped.name : ""]]));
  if (node.kind === "feature") parts.push(feature ? featurePart(feature, data.strings, node) : html("p", { class: "soft" }, "Its contexts are not on this page; they come from ", html("code", {}, `clt features features.ids=[${node.layer}/${node.index}]`), " and a new clt graph."));
  if (target) parts.push(...inputParts({ members: [i] }, node.kind === "logit" ? "logit above the mean" : "pre-activation"));
  if (node.kind !== "logit") parts.push(edgeList(outputsOf(i), "Outputs", "share of what the target reads", walk));
  return parts;
}

function buttons(i, grouped) {
  const place = html("p", { class: "buttons" }, html("button", { id: "pin", onclick: pin }, i !== null && state.pinned.has(i) ? "unpin" : "pin", html("kbd", {}, "p")));
  if (grouped) place.append(html("button", { onclick: () => ungroup(state.groups.indexOf(grouped)) }, "dissolve group"), html("button", { onclick: () => { grouped.members = grouped.members.filter((m) => m !== i); state.groups = state.groups.filter((g) => g.members.length); remember(); draw(); } }, "take out"));
  place.append(html("button", { onclick: () => select(null) }, "close", html("kbd", {}, "Esc")));
  return place;
}

function groupPanel(at) {
  const one = state.groups[at], key = "g" + at, item = items.find((other) => other.key === key);
  const name = html("input", { value: one.name, "aria-label": "name of the group", onchange: (event) => { one.name = event.target.value && event.target.value !== one.name ? unlike(event.target.value) : one.name; remember(); draw(); } });
  const reads = one.members.every((i) => graph.nodes[i].value !== null);
  const lists = item ? [...(reads ? inputParts(item, "pre-activation, mean") : []), groupOutputs(item)] : [];
  const members = html("ul", { class: "members" }, ...one.members.map((i) => html("li", {}, html("button", { class: "walk", onclick: () => select("n" + i) }, icon(graph.nodes[i].kind), html("span", { class: "name" }, title(graph.nodes[i])), html("span", { class: "at" }, short(graph.nodes[i]))))));
  return [html("h2", {}, name), html("p", { class: "buttons" }, html("button", { id: "pin", onclick: pin }, one.members.every((i) => state.pinned.has(i)) ? "unpin" : "pin", html("kbd", {}, "p")), html("button", { onclick: () => toggle(at) }, one.open ? "collapse" : "show its members"), html("button", { onclick: () => ungroup(at) }, "dissolve"), html("button", { onclick: () => select(null) }, "close", html("kbd", {}, "Esc"))), html("section", {}, html("h3", {}, "Members"), members), ...lists];
}

function groupOutputs(item) {
  const rows = edges.filter((edge) => edge.from === item).map((edge) => {
    const all = edge.to.members.reduce((sum, t) => sum + partOf(edge.to, t) * graph.total[t], 0);
    return rowOf(edge.to, edge.weight, Math.abs(edge.weight) / Math.max(all, 1e-30));
  });
  return edgeList(rows.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)), "Outputs", "share of what the target reads", walk);
}

function severalPanel() {
  const name = html("input", { placeholder: "name of the group", id: "group-name", onkeydown: (event) => { if (event.key === "Enter") group(event.target.value); } });
  const chosen = state.selected.map((key) => { const nodes = membersOf(key).map((i) => graph.nodes[i]); return html("li", {}, isGroup(key) ? state.groups[Number(key.slice(1))].name : title(nodes[0]), html("span", { class: "at" }, " " + (isGroup(key) ? `${nodes.length} features` : short(nodes[0])))); });
  return [html("h2", {}, `${state.selected.length} chosen`), html("ul", {}, ...chosen), html("p", { class: "buttons" }, name, html("button", { id: "make-group", onclick: () => group(name.value) }, "group", html("kbd", {}, "g")), html("button", { id: "pin", onclick: pin }, "pin", html("kbd", {}, "p")), html("button", { onclick: () => select(null) }, "close", html("kbd", {}, "Esc")))];
}

function overview() {
  const outputs = graph.nodes.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
  const most = Math.max(1e-30, ...outputs.map((node) => node.probability));
  const table = html("ol", { class: "outputs" }, ...outputs.map((node) => html("li", {}, html("button", { class: "walk", "data-key": "n" + node.i, onclick: () => select("n" + node.i) }, html("i", { class: "bar plain", style: `width:${100 * node.probability / most}%` }), html("span", { class: "name" }, plainToken(node.label)), html("span", { class: "at" }, node.probability ? `logit ${signed(node.value)}` : ""), html("b", {}, node.probability ? percent(node.probability) : signed(node.value))))));
  const best = items.filter((item) => item.kind === "feature" || item.box).sort((a, b) => b.influence - a.influence).slice(0, 10);
  const largest = Math.max(1e-30, ...best.map((item) => item.influence));
  const top = html("ol", {}, ...best.map((item) => html("li", {}, html("button", { class: "walk", "data-key": item.key, onclick: () => select(item.key) }, html("i", { class: "bar plain", style: `width:${(100 * item.influence / largest).toFixed(1)}%` }), icon("feature"), html("span", { class: "name" }, item.node ? title(item.node) : item.label), html("span", { class: "at" }, item.node ? short(item.node) : `${item.members.length} features`), html("b", {}, percent(item.influence / graph.influenceTotal))))));
  const count = (kind) => items.filter((item) => item.kind === kind).length;
  const parts = [html("h2", {}, "Outputs"), table, html("section", {}, html("h3", {}, "Most influential", html("small", {}, "share of all influence on the outputs")), top)];
  parts.push(html("section", {}, html("h3", {}, "How much of the model this explains"), facts(data.scores.map(([name, value, about]) => [name, number(value), about])), html("p", { class: "soft" }, `${graph.nodes.filter((node, i) => node.kind === "feature" && pruned.nodes[i]).length} of ${data.n_active} active features and ${pruned.edges.reduce((a, b) => a + b, 0)} edges are left at these thresholds; ${Math.min(state.d, edges.length)} edges are drawn.`)));
  if (state.groups.length) parts.push(html("section", {}, html("h3", {}, "Groups"), html("ul", { class: "members" }, ...state.groups.map((one, at) => html("li", {}, html("button", { class: "walk", onclick: () => select("g" + at) }, html("span", { class: "name" }, one.name), html("span", { class: "at" }, `${one.members.length} ${one.members.length === 1 ? "node" : "nodes"}${one.open ? ", shown" : ""}`)))))));
  parts.push(html("details", {}, html("summary", {}, "Settings"), facts(data.settings)));
  return parts;
}

function panel() {
  const place = $("panel"), [only] = state.selected;
  const parts = state.selected.length > 1 ? severalPanel() : !only ? overview() : isGroup(only) ? groupPanel(Number(only.slice(1))) : nodePanel(Number(only.slice(1)));
  place.replaceChildren(...parts);
  place.scrollTop = 0;
}

function controls() {
  for (const [id, text] of [["n", percent(state.n)], ["e", percent(state.e)], ["d", String(state.d)]]) {
    $(id).value = state[id];
    $(id + "-value").textContent = text;
  }
  $("labels").value = state.l;
  $("width").value = state.w;
  $("only").checked = Boolean(Number(state.o));
  $("groups-count").textContent = String(state.groups.length);
  $("collapsed").checked = state.groups.some((one) => !one.open);
  $("collapsed").disabled = !state.groups.length;
  $("pins").textContent = String(state.pinned.size);
  const off = String(state.h).split(" ");
  document.querySelectorAll("#legend button").forEach((button) => button.setAttribute("aria-pressed", String(!off.includes(button.dataset.kind))));
}

for (const id of ["n", "e", "d"]) $(id).addEventListener("input", (event) => { state[id] = Number(event.target.value); draw(); });
$("n").max = data.thresholds.most;
$("labels").addEventListener("change", (event) => { state.l = event.target.value; draw(); });
$("width").addEventListener("change", (event) => { state.w = event.target.value; draw(); });
$("only").addEventListener("change", (event) => { state.o = event.target.checked ? 1 : 0; draw(); });
$("collapsed").addEventListener("change", (event) => {
  for (const one of state.groups) one.open = !event.target.checked;
  state.selected = state.selected.filter((key) => !isGroup(key));
  draw();
});
for (const kind of KINDS.filter((one) => one !== "logit" && graph.nodes.some((node) => node.kind === one)))
  $("legend").append(html("button", { "data-kind": kind, title: "show or hide; what is hidden still counts in every sum", onclick: () => {
    const off = new Set(String(state.h).split(" ").filter(Boolean));
    if (!off.delete(kind)) off.add(kind);
    state.h = [...off].join(" ");
    draw();
  } }, icon(kind), kind === "position_0" ? "MLP at position 0" : kind === "rest" ? "features cut" : kind));
$("save").addEventListener("click", () => {
  const link = html("a", { download: data.slug + ".supernodes.json", href: URL.createObjectURL(new Blob([JSON.stringify(remember(), null, 1)], { type: "application/json" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
$("open").addEventListener("change", async (event) => {
  const text = await event.target.files[0].text();
  event.target.value = "";
  let given;
  try { given = JSON.parse(text); } catch (error) { if (!(error instanceof SyntaxError)) throw error; }
  const groups = given && listed(given.supernodes);
  if (!groups) return say("that file holds no groups; give one that “save” wrote");
  setGroups(groups);
  state.pinned = new Set((given.pinned || []).filter((id) => byId.has(id)).map((id) => byId.get(id).i));
  state.selected = [];
  remember();
  return draw();
});
$("reset").addEventListener("click", () => {
  Object.assign(state, defaults, { selected: [], pinned: new Set() });
  setGroups(data.supernodes);
  remember();
  draw();
});
readAddress();
draw();
document.body.dataset.drawn = "yes";

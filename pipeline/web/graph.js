"use strict";
// What is shown and chosen, kept in the address (#...), and how keys, clicks and sliders change it.

const data = JSON.parse(document.getElementById("graph").textContent);
const graph = readGraph(data);
const byId = new Map(graph.nodes.map((node) => [node.id, node]));
const $ = (id) => document.getElementById(id);
const texts = data.tokens.map(plainToken);
const rowNames_ = ["tokens", ...Array.from({ length: data.n_layers }, (_, l) => `layer ${l}`), "outputs"];
const tokenIds = data.tokens.map((_, p) => (graph.nodes.find((node) => node.kind === "token" && node.position === p) || { id: "" }).id);
const store = "clt graph " + data.key;
const initialGroups = JSON.stringify(data.supernodes);
const defaults = { n: data.thresholds.node, e: data.thresholds.edge, d: 70, l: "auto", w: "weight", o: 0, h: "bias" }; // biases reach everything: on demand
const state = { ...defaults, selected: [], pinned: new Set(), groups: [] };
let pruned, items = [], edges = [], itemOf = new Map(), placed, hovered = null;

// -- groups: [{ name, members: [i], open }] -----------------------------------------------------------------------

function setGroups(listed) {
  const taken = new Set();
  state.groups = [];
  for (const [name, ...ids] of listed) {
    const members = ids.filter((id) => byId.has(id)).map((id) => byId.get(id).i).filter((i) => !taken.has(i));
    members.forEach((i) => taken.add(i));
    if (members.length) state.groups.push({ name: String(name), members, open: false });
  }
}
const listGroups = () => state.groups.map((group) => [group.name, ...group.members.map((i) => graph.nodes[i].id)]);
const groupOf = (i) => state.groups.find((group) => group.members.includes(i));

function remember() {
  const given = { supernodes: listGroups().map(([label, ...nodes]) => ({ label, nodes })), pinned: [...state.pinned].map((i) => graph.nodes[i].id) };
  try { localStorage.setItem(store, JSON.stringify(given)); } catch (error) { if (!(error instanceof DOMException)) throw error; }
  return given;
}

// The groups of a file, in the form that pipeline/interp/supernodes.py writes.
const listed = (groups) => (Array.isArray(groups) ? groups.filter((one) => one && Array.isArray(one.nodes)).map((one) => [one.label, ...one.nodes]) : null);

function recall() {
  try { return JSON.parse(localStorage.getItem(store)) || {}; } catch (error) {
    if (error instanceof DOMException || error instanceof SyntaxError) return {};
    throw error;
  }
}

// -- the address ---------------------------------------------------------------------------------------------------

function writeAddress() {
  const parts = new URLSearchParams();
  for (const key of Object.keys(defaults)) if (String(state[key]) !== String(defaults[key])) parts.set(key, state[key]);
  if (state.selected.length) parts.set("s", state.selected.map(nameOfKey).join(" "));
  if (state.pinned.size) parts.set("p", [...state.pinned].map((i) => graph.nodes[i].id).join(" "));
  const groups = JSON.stringify(listGroups());
  if (groups !== initialGroups) parts.set("g", groups);
  const open = state.groups.map((group, at) => (group.open ? at : -1)).filter((at) => at >= 0);
  if (open.length) parts.set("open", open.join(" "));
  history.replaceState(null, "", "#" + parts.toString());
}

// A key is "n12" for a node and "g0" for a group; in the address a node has its own name.
const nameOfKey = (key) => (key[0] === "n" ? graph.nodes[Number(key.slice(1))].id : "group:" + key.slice(1));
const keyOfName = (name) => (name.startsWith("group:") ? "g" + name.slice(6) : byId.has(name) ? "n" + byId.get(name).i : null);
const exists = (key) => key !== null && (key[0] === "n" || state.groups[Number(key.slice(1))] !== undefined);

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1)), kept = recall();
  for (const key of Object.keys(defaults)) {
    const given = parts.get(key);
    state[key] = given === null ? defaults[key] : typeof defaults[key] === "number" && Number.isFinite(Number(given)) ? Number(given) : typeof defaults[key] === "number" ? defaults[key] : given;
  }
  state.n = Math.min(Math.max(state.n, 0), data.thresholds.most);
  state.e = Math.min(Math.max(state.e, 0), 1);
  let groups = listed(kept.supernodes) || data.supernodes;
  if (parts.has("g")) try { groups = JSON.parse(parts.get("g")); } catch (error) { if (!(error instanceof SyntaxError)) throw error; }
  setGroups(Array.isArray(groups) ? groups.filter(Array.isArray) : []);
  for (const at of (parts.get("open") || "").split(" ")) if (at && state.groups[at]) state.groups[at].open = true;
  const pins = parts.has("p") ? parts.get("p").split(" ") : kept.pinned || [];
  state.pinned = new Set(pins.filter((id) => byId.has(id)).map((id) => byId.get(id).i));
  state.selected = (parts.get("s") || "").split(" ").filter(Boolean).map(keyOfName).filter(exists);
}

// -- what is drawn -------------------------------------------------------------------------------------------------

const row = (node) => (node.layer < 0 ? 0 : Math.min(node.layer, data.n_layers) + 1);
const label = (node) => node.label || `${node.layer}/${node.index}`;
const title = (node) => (node.kind === "feature" ? label(node) : node.kind === "token" ? plainToken(node.label) : node.kind === "logit" ? plainToken(node.label) : node.kind === "bias" ? "biases of " + where(node, data) : ONE[node.kind]);
const hidden = (node) => String(state.h).split(" ").includes(node.kind);
const isGroup = (key) => key[0] === "g";
const membersOf = (key) => (isGroup(key) ? state.groups[Number(key.slice(1))].members : [Number(key.slice(1))]);

function visible(node) {
  const chosen = state.selected.includes("n" + node.i);
  if (chosen || state.pinned.has(node.i)) return true;
  if (state.o) return node.kind === "logit" ? node.influence + node.weight > 0 : groupOf(node.i) !== undefined || node.kind === "token";
  return pruned.nodes[node.i] === 1 && !hidden(node);
}

function makeItems() {
  const there = graph.nodes.filter(visible), most = Math.max(...graph.nodes.map((node) => node.influence), 1e-30);
  const radius = (influence) => 3.6 + 4 * Math.sqrt(Math.min(1, influence / most));
  items = [];
  itemOf = new Map();
  state.groups.forEach((group, at) => {
    const members = group.members.filter((i) => there.includes(graph.nodes[i]) && !state.selected.includes("n" + i));
    if (group.open || !members.length) return;
    const nodes = members.map((i) => graph.nodes[i]).sort((a, b) => row(a) - row(b));
    const influence = nodes.reduce((sum, node) => sum + node.influence, 0), columns = new Map();
    nodes.forEach((node) => columns.set(node.position + 1, (columns.get(node.position + 1) || 0) + node.influence));
    const item = { key: "g" + at, kind: "group", box: true, labelled: true, label: group.name, members, influence, radius: 10, row: row(nodes[Math.floor(nodes.length / 2)]), column: [...columns].sort((a, b) => b[1] - a[1])[0][0] };
    items.push(item);
    members.forEach((i) => itemOf.set(i, item));
  });
  for (const node of there) {
    if (itemOf.has(node.i)) continue;
    const item = { key: "n" + node.i, kind: node.kind, node, members: [node.i], row: row(node), column: node.position + 1, influence: node.influence,
      radius: node.kind === "logit" ? 5.5 : node.kind === "token" ? 4.5 : node.kind === "feature" ? radius(node.influence) : Math.min(radius(node.influence), 5.5),
      labelled: node.kind === "feature" || node.kind === "logit", label: node.kind === "logit" ? `${plainToken(node.label)}  ${node.probability ? percent(node.probability) : number(node.value)}` : label(node) };
    items.push(item);
    itemOf.set(node.i, item);
  }
}

// A member's part of its group: of the activation of those that are drawn, as in pipeline/interp/supernodes.py.
function partOf(item, i) {
  if (item.members.length === 1) return 1;
  const size = (m) => (graph.nodes[m].kind === "logit" ? graph.nodes[m].probability : graph.nodes[m].activation);
  const sum = item.members.reduce((total, m) => total + size(m), 0);
  return sum > 0 ? size(i) / sum : 1 / item.members.length;
}

// Edges between what is drawn. Of a group: summed over the members that are sources, the mean over those that are
// targets, each by its part.
function makeEdges() {
  const found = new Map(), loose = new Set([...state.pinned, ...state.selected.filter((key) => !isGroup(key)).flatMap(membersOf)]);
  graph.source.forEach((s, e) => {
    const t = graph.target[e], from = itemOf.get(s), to = itemOf.get(t);
    if (!from || !to || from === to) return;
    if (!pruned.edges[e] && !loose.has(s) && !loose.has(t) && !state.o) return;
    const key = from.key + ">" + to.key;
    if (!found.has(key)) found.set(key, { from, to, weight: 0, flow: 0 });
    const edge = found.get(key);
    edge.weight += graph.weight[e] * partOf(to, t);
    edge.flow += graph.flow[e];
  });
  edges = [...found.values()].sort((a, b) => b.flow - a.flow);
}

function draw() {
  if (!pruned || pruned.at !== `${state.n} ${state.e}`) pruned = { ...prune(graph, state.n, state.e), at: `${state.n} ${state.e}` };
  state.selected = state.selected.filter(exists);
  makeItems();
  makeEdges();
  const frame = $("frame"), size = { width: Math.max(frame.clientWidth - 2, 320), height: Math.max(frame.clientHeight - 2, 300) };
  placed = layout(items, texts, rowNames_.length, size, state.l);
  paint();
  panel();
  controls();
  writeAddress();
}

function paint() {
  const focus = new Set(state.selected), of = (edge) => focus.has(edge.from.key) || focus.has(edge.to.key);
  const strongest = edges.slice(0, state.d), mine = focus.size ? edges.filter(of) : [];
  const size = (edge) => (state.w === "flow" ? edge.flow : Math.abs(edge.weight));
  const scaled = (list) => list.map((edge) => ({ ...edge, weight: Math.sign(edge.weight) * size(edge) }));
  const heaviest = (list) => Math.max(1e-30, ...list.map(size));
  const near = new Set(mine.flatMap((edge) => [edge.from.key, edge.to.key]));
  const picture = svg("svg", { id: "picture", width: placed.width, height: placed.height, viewBox: `0 0 ${placed.width} ${placed.height}`, class: focus.size ? "focused" : "", role: "img", "aria-label": "attribution graph" });
  picture.append(bands(placed, texts), drawEdges(scaled(strongest.filter((edge) => !of(edge))), heaviest(strongest), "rest-edges"));
  picture.append(drawEdges(scaled(mine), heaviest(mine), "own-edges"));
  const group = svg("g", { class: "nodes" });
  for (const item of items) {
    const classes = [focus.has(item.key) ? "selected" : "", near.has(item.key) ? "near" : "", item.members.some((i) => state.pinned.has(i)) ? "pinned" : "", item.node && groupOf(item.node.i) ? "grouped" : ""];
    group.append(drawItem(item, classes.filter(Boolean).join(" ")));
  }
  picture.append(group);
  const names = rowNames(placed, rowNames_), keys = tokenIds.map((id) => (id ? "n" + byId.get(id).i : ""));
  const axis = tokenAxis(placed, texts, keys, focus);
  picture.append(names, svg("g", { transform: `translate(0 ${placed.plot})` }, axis));
  const first = !$("picture");
  $("frame").replaceChildren(picture);
  if (first) $("frame").scrollLeft = placed.width; // the outputs stand at the end
  follow();
}

// The names of rows and the tokens stay in view while the picture is scrolled.
function follow() {
  const frame = $("frame"), picture = $("picture");
  if (!picture) return;
  picture.querySelector(".row-names").setAttribute("transform", `translate(${frame.scrollLeft} 0)`);
  const low = Math.min(0, frame.scrollTop + frame.clientHeight - placed.axis - placed.plot);
  picture.querySelector(".axis").setAttribute("transform", `translate(0 ${low})`);
}

// -- choosing ------------------------------------------------------------------------------------------------------

function select(key, more = false) {
  if (key === null || !exists(key)) state.selected = [];
  else if (!more) state.selected = [key];
  else state.selected = state.selected.includes(key) ? state.selected.filter((k) => k !== key) : [...state.selected, key];
  tip(null);
  draw();
  if (key !== null) reveal(key);
}

function say(text) {
  $("said").textContent = text;
  setTimeout(() => { $("said").textContent = ""; }, 6000);
}

function reveal(key) {
  const item = items.find((one) => one.key === key), frame = $("frame");
  if (!item) return;
  const view = { left: frame.scrollLeft + LEFT, right: frame.scrollLeft + frame.clientWidth - 40, top: frame.scrollTop + 10, bottom: frame.scrollTop + frame.clientHeight - placed.axis };
  if (item.x < view.left || item.x > view.right) frame.scrollLeft = item.x - frame.clientWidth / 2;
  if (item.y < view.top || item.y > view.bottom) frame.scrollTop = item.y - frame.clientHeight / 2;
}

// Up and down: along the strongest edge out of or into the node. Left and right: the next one of the row.
function step(key) {
  const now = items.find((item) => item.key === state.selected.at(-1));
  if (!now) return select([...items].filter((item) => item.kind === "logit").sort((a, b) => b.node.probability - a.node.probability)[0]?.key ?? null);
  if (key === "ArrowUp" || key === "ArrowDown") {
    const next = edges.filter((edge) => (key === "ArrowUp" ? edge.from : edge.to) === now).sort((a, b) => b.flow - a.flow)[0];
    return next && select((key === "ArrowUp" ? next.to : next.from).key);
  }
  const line = items.filter((item) => item.row === now.row).sort((a, b) => a.x - b.x || a.y - b.y);
  const next = line[line.indexOf(now) + (key === "ArrowLeft" ? -1 : 1)];
  return next && select(next.key);
}

function pin() {
  const members = state.selected.flatMap(membersOf), all = members.every((i) => state.pinned.has(i));
  members.forEach((i) => (all ? state.pinned.delete(i) : state.pinned.add(i)));
  remember();
  draw();
}

function group(name) {
  const members = [...new Set(state.selected.flatMap(membersOf))], kinds = new Set(members.map((i) => graph.nodes[i].kind));
  if (kinds.size > 1) return say("a group has nodes of one kind");
  for (const old of state.groups) old.members = old.members.filter((i) => !members.includes(i));
  state.groups = state.groups.filter((old) => old.members.length);
  state.groups.push({ name: unlike(name || title(graph.nodes[members[0]])), members, open: false });
  state.selected = ["g" + (state.groups.length - 1)];
  remember();
  return draw();
}

// A name that no other group has.
function unlike(name) {
  const taken = (one) => state.groups.some((old) => old.name === one);
  let found = name;
  for (let n = 2; taken(found); n++) found = `${name} (${n})`;
  return found;
}

function ungroup(at) {
  state.selected = state.groups[at].members.map((i) => "n" + i);
  state.groups.splice(at, 1);
  remember();
  draw();
}

function tip(item, event) {
  const place = $("tip");
  place.hidden = !item;
  document.querySelectorAll(".edge.hot").forEach((edge) => edge.classList.remove("hot"));
  if (!item) return;
  document.querySelectorAll(`.edge[data-from="${item.key}"], .edge[data-to="${item.key}"]`).forEach((edge) => edge.classList.add("hot"));
  const node = item.node, lines = [];
  if (node) {
    lines.push(node.kind === "feature" ? `${where(node, data)}, feature ${node.index}` : `${ONE[node.kind]}, ${where(node, data)}`);
    if (node.activation) lines.push(`activation ${number(node.activation)}`);
    if (node.value !== null) lines.push(`${node.kind === "logit" ? "logit above the mean" : "pre-activation"} ${number(node.value)}`);
    if (node.probability) lines.push(`probability ${percent(node.probability)}`);
    lines.push(`influence ${percent(node.influence / graph.influenceTotal)}`);
  } else lines.push(...item.members.slice(0, 6).map((i) => label(graph.nodes[i]) + ", " + where(graph.nodes[i], data)));
  place.replaceChildren(html("b", {}, node ? title(node) : item.label), ...lines.map((line) => html("div", {}, line)));
  const box = place.getBoundingClientRect();
  place.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  place.style.top = Math.max(4, event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16) + "px";
}

// -- events --------------------------------------------------------------------------------------------------------

const keyAt = (event) => event.target.closest?.("[data-key]")?.dataset.key ?? null;
$("frame").addEventListener("scroll", follow);
$("frame").addEventListener("click", (event) => select(keyAt(event) || null, event.shiftKey));
$("frame").addEventListener("dblclick", (event) => { const key = keyAt(event); if (key && isGroup(key)) toggle(Number(key.slice(1))); });
$("frame").addEventListener("mousemove", (event) => {
  const key = keyAt(event), item = key && items.find((one) => one.key === key);
  if (item || hovered) tip(item || null, event);
  hovered = item;
});
$("frame").addEventListener("mouseleave", () => tip(null));
function toggle(at) {
  state.groups[at].open = !state.groups[at].open;
  state.selected = [];
  draw();
}
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input:not([type=range]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") select(null);
  else if (event.key === "p" && state.selected.length) pin();
  else if (event.key === "g" && state.selected.length) group("");
  else if (event.key.startsWith("Arrow") && !event.target.closest("input")) step(event.key);
  else return;
  event.preventDefault();
});
addEventListener("hashchange", () => { readAddress(); draw(); });
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });

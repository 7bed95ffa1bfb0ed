"use strict";
// What is drawn, and how keys and clicks change it.

let pruned, items = [], edges = [], itemOf = new Map(), placed, hovered = null;

const row = (node) => (node.layer < 0 ? 0 : Math.min(node.layer, data.n_layers) + 1);
const label = (node) => node.label || `${node.layer}/${node.index}`;
function title(node) {
  if (node.kind === "feature") return label(node);
  if (node.kind === "token" || node.kind === "logit") return plainToken(node.label);
  return node.kind === "bias" ? "biases of " + where(node, data) : ONE[node.kind];
}
const hidden = (node) => String(state.h).split(" ").includes(node.kind);
const isGroup = (key) => key[0] === "g";
const membersOf = (key) => (isGroup(key) ? state.groups[Number(key.slice(1))].members : [Number(key.slice(1))]);

const onPath = () => (state.path >= 0 ? data.paths[state.path].nodes : []);

function visible(node) {
  const chosen = state.selected.includes("n" + node.i);
  if (chosen || state.pinned.has(node.i) || onPath().includes(node.i)) return true;
  if (state.o) return node.kind === "logit" || node.kind === "token" || groupOf(node.i) !== undefined;
  return pruned.nodes[node.i] === 1 && !hidden(node);
}

function makeItems() {
  const there = graph.nodes.filter(visible);
  items = [];
  itemOf = new Map();
  state.groups.forEach((group, at) => {
    const members = group.members.filter((i) => visible(graph.nodes[i]) && !state.selected.includes("n" + i));
    if (!group.open && members.length) items.push(groupItem(group, at, members));
  });
  for (const item of items) item.members.forEach((i) => itemOf.set(i, item));
  for (const node of there) {
    if (itemOf.has(node.i)) continue;
    const item = nodeItem(node);
    items.push(item);
    itemOf.set(node.i, item);
  }
}

// A group stands in the middle one of its members' rows and in the column with most of its influence.
function groupItem(group, at, members) {
  const nodes = members.map((i) => graph.nodes[i]).sort((a, b) => row(a) - row(b)), columns = new Map();
  nodes.forEach((node) => columns.set(node.position + 1, (columns.get(node.position + 1) || 0) + node.influence));
  return {
    key: "g" + at, kind: "group", box: true, labelled: true, label: group.name, members, radius: 10,
    influence: nodes.reduce((sum, node) => sum + node.influence, 0),
    row: row(nodes[Math.floor(nodes.length / 2)]),
    column: [...columns].sort((a, b) => b[1] - a[1])[0][0],
  };
}

const mostInfluence = Math.max(...graph.nodes.map((node) => node.influence), 1e-30);

function nodeItem(node) {
  const radius = 3.6 + 4 * Math.sqrt(node.influence / mostInfluence), isLogit = node.kind === "logit";
  const amount = node.probability ? percent(node.probability) : number(node.value);
  return {
    key: "n" + node.i, kind: node.kind, node, members: [node.i], influence: node.influence,
    row: row(node), column: node.position + 1,
    radius: isLogit ? 5.5 : node.kind === "token" ? 4.5 : node.kind === "feature" ? radius : Math.min(radius, 5.5),
    labelled: node.kind === "feature" || isLogit,
    label: isLogit ? `${plainToken(node.label)}  ${amount}` : label(node),
  };
}

// A member's part of its group: of the activation of those that are drawn, as in pipeline/interp/circuits/supernodes.py.
function partOf(item, i) {
  if (item.members.length === 1) return 1;
  const size = (m) => (graph.nodes[m].kind === "logit" ? graph.nodes[m].probability : graph.nodes[m].activation);
  const sum = item.members.reduce((total, m) => total + size(m), 0);
  return sum > 0 ? size(i) / sum : 1 / item.members.length;
}

// Edges between what is drawn. Of a group: summed over the members that are sources, the mean over those that are
// targets, each by its part.
function makeEdges() {
  const chosen = state.selected.filter((key) => !isGroup(key)).flatMap(membersOf);
  const found = new Map(), loose = new Set([...state.pinned, ...onPath(), ...chosen]);
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
  const at = `${state.n} ${state.e}`;
  if (pruned?.at !== at) pruned = { ...prune(graph, state.n, state.e), at };
  state.selected = state.selected.filter(exists);
  makeItems();
  makeEdges();
  const frame = $("frame"), size = { width: Math.max(frame.clientWidth - 2, 320), height: Math.max(frame.clientHeight - 2, 300) };
  placed = layout(items, texts, rowTexts.length, size, state.l);
  paint();
  panel();
  controls();
  writeAddress();
}

function paint() {
  const path = onPath().map((i) => itemOf.get(i));
  const focus = new Set(path.length ? path.map((item) => item.key) : state.selected);
  const along = (edge) => path.some((item, at) => item === edge.from && path[at + 1] === edge.to);
  const own = (edge) => (path.length ? along(edge) : focus.has(edge.from.key) || focus.has(edge.to.key));
  const strongest = edges.slice(0, state.d), mine = focus.size ? edges.filter(own) : [];
  const near = new Set(mine.flatMap((edge) => [edge.from.key, edge.to.key]));
  const { width, height } = placed;
  const picture = svg("svg", {
    id: "picture", width, height, viewBox: `0 0 ${width} ${height}`, class: focus.size ? "focused" : "",
    role: "img", "aria-label": "attribution graph",
  });
  picture.append(bands(placed, texts), edgesOf(strongest.filter((edge) => !own(edge)), strongest, "rest-edges"));
  picture.append(edgesOf(mine, mine, "own-edges"));
  const marks = svg("g", { class: "nodes" });
  for (const item of items) {
    const classes = {
      selected: focus.has(item.key), near: near.has(item.key),
      pinned: item.members.some((i) => state.pinned.has(i)), grouped: item.node && groupOf(item.node.i),
    };
    marks.append(drawItem(item, Object.keys(classes).filter((name) => classes[name]).join(" ")));
  }
  const axis = tokenAxis(placed, texts, tokenNodes.map((node) => "n" + node.i), focus);
  picture.append(marks, rowNames(placed, rowTexts), svg("g", { transform: `translate(0 ${placed.plot})` }, axis));
  const first = !$("picture");
  $("frame").replaceChildren(picture);
  if (first) $("frame").scrollLeft = placed.width; // the outputs stand at the end
  follow();
}

// Some edges, their widths on the scale of those that they are drawn with.
function edgesOf(some, scale, name) {
  const size = (edge) => (state.w === "flow" ? edge.flow : Math.abs(edge.weight));
  const scaled = some.map((edge) => ({ ...edge, weight: Math.sign(edge.weight) * size(edge) }));
  return drawEdges(scaled, Math.max(1e-30, ...scale.map(size)), name);
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
  state.path = -1;
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

function follows(at) {
  state.selected = [];
  state.path = state.path === at ? -1 : at;
  draw();
  if (state.path >= 0) reveal(itemOf.get(onPath()[1]).key);
}

function reveal(key) {
  const item = items.find((one) => one.key === key), frame = $("frame");
  if (!item) return;
  const x = item.x - frame.scrollLeft, y = item.y - frame.scrollTop;
  if (x < LEFT || x > frame.clientWidth - 40) frame.scrollLeft = item.x - frame.clientWidth / 2;
  if (y < 10 || y > frame.clientHeight - placed.axis) frame.scrollTop = item.y - frame.clientHeight / 2;
}

// Up and down: along the strongest edge out of or into the node. Left and right: the next one of the row.
function step(key) {
  const now = items.find((item) => item.key === state.selected.at(-1));
  if (!now) {
    const outputs = items.filter((item) => item.kind === "logit").sort((a, b) => b.node.probability - a.node.probability);
    return select(outputs[0]?.key ?? null);
  }
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

// A node that the pointer is on, in the picture or in a list, and its edges.
function point(key) {
  document.querySelectorAll("#picture .hot").forEach((one) => one.classList.remove("hot"));
  if (!key) return;
  const shown = `#picture .edge[data-from="${key}"], #picture .edge[data-to="${key}"], #picture .node[data-key="${key}"]`;
  document.querySelectorAll(shown).forEach((one) => one.classList.add("hot"));
}

function tip(item, event) {
  const place = $("tip");
  place.hidden = !item;
  point(item?.key);
  if (!item) return;
  const lines = item.node ? told(item.node) : item.members.slice(0, 6).map((i) => told(graph.nodes[i])[0]);
  const name = item.node ? title(item.node) : item.label;
  place.replaceChildren(html("b", {}, name), ...lines.map((line) => html("div", {}, line)));
  const { width, height } = place.getBoundingClientRect(), below = event.clientY + 16;
  place.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  place.style.top = Math.max(4, below + height > innerHeight ? event.clientY - height - 10 : below) + "px";
}

// A node in lines.
function told(node) {
  const name = node.kind === "feature" ? `feature ${node.layer}/${node.index}` : ONE[node.kind];
  const lines = [`${name}, ${where(node, data)}`];
  if (node.activation) lines.push(`activation ${number(node.activation)}`);
  if (node.value !== null) lines.push(`${unitOf(node)} ${number(node.value)}`);
  if (node.probability) lines.push(`probability ${percent(node.probability)}`);
  lines.push(`influence ${percent(node.influence / graph.influenceTotal)}`);
  return lines;
}
const unitOf = (node) => (node.kind === "logit" ? "logit above the mean" : "pre-activation");

// -- events --------------------------------------------------------------------------------------------------------

const keyAt = (event) => event.target.closest?.("[data-key]")?.dataset.key ?? null;
$("frame").addEventListener("scroll", follow);
$("frame").addEventListener("click", (event) => select(keyAt(event) || null, event.shiftKey));
$("frame").addEventListener("dblclick", (event) => {
  const key = keyAt(event);
  if (key && isGroup(key)) toggle(Number(key.slice(1)));
});
$("frame").addEventListener("mousemove", (event) => {
  const key = keyAt(event), item = key && items.find((one) => one.key === key);
  if (item || hovered) tip(item || null, event);
  hovered = item;
});
$("frame").addEventListener("mouseleave", () => tip(null));
$("panel").addEventListener("mouseover", (event) => point(keyAt(event)));
$("panel").addEventListener("mouseleave", () => point(null));
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

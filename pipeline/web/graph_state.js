"use strict";
// What is shown and chosen: kept in the address (#...), groups and pins in the browser's storage as well.

const data = JSON.parse(document.getElementById("graph").textContent);
const graph = readGraph(data);
const byId = new Map(graph.nodes.map((node) => [node.id, node]));
const $ = (id) => document.getElementById(id);
const texts = data.tokens.map(plainToken);
const rowTexts = ["tokens", ...Array.from({ length: data.n_layers }, (_, l) => `layer ${l}`), "outputs"];
const tokenNodes = graph.nodes.filter((node) => node.kind === "token").sort((a, b) => a.position - b.position);
const store = "clt graph " + data.key;
const initialGroups = JSON.stringify(data.supernodes);
// Shares of nodes and edges, edges drawn, labels, width, pinned nodes only, hidden kinds (biases reach everything).
const defaults = { n: data.thresholds.node, e: data.thresholds.edge, d: 70, l: "auto", w: "weight", o: 0, h: "bias" };
const state = { ...defaults, path: -1, selected: [], pinned: new Set(), groups: [] };

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
  const supernodes = listGroups().map(([label, ...nodes]) => ({ label, nodes }));
  const given = { supernodes, pinned: [...state.pinned].map((i) => graph.nodes[i].id) };
  try {
    localStorage.setItem(store, JSON.stringify(given));
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // no storage for this page
  }
  return given;
}

// The groups of a file, in the form that pipeline/interp/circuits/supernodes.py writes.
function listed(groups) {
  if (!Array.isArray(groups)) return null;
  return groups.filter((one) => one && Array.isArray(one.nodes)).map((one) => [one.label, ...one.nodes]);
}

// null for what is no JSON.
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
}

function recall() {
  try {
    return parsed(localStorage.getItem(store)) || {};
  } catch (error) {
    if (error instanceof DOMException) return {}; // no storage for this page
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
  if (state.path >= 0) parts.set("path", state.path);
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
    const isNumber = typeof defaults[key] === "number";
    const means = given !== null && (!isNumber || Number.isFinite(Number(given)));
    state[key] = means ? (isNumber ? Number(given) : given) : defaults[key];
  }
  state.n = Math.min(Math.max(state.n, 0), data.thresholds.most);
  state.e = Math.min(Math.max(state.e, 0), 1);
  const groups = parts.has("g") ? parsed(parts.get("g")) : listed(kept.supernodes);
  setGroups(Array.isArray(groups) ? groups.filter(Array.isArray) : data.supernodes);
  for (const at of (parts.get("open") || "").split(" ")) if (at && state.groups[at]) state.groups[at].open = true;
  const pins = parts.has("p") ? parts.get("p").split(" ") : kept.pinned || [];
  state.pinned = new Set(pins.filter((id) => byId.has(id)).map((id) => byId.get(id).i));
  state.path = data.paths[parts.get("path")] ? Number(parts.get("path")) : -1;
  state.selected = (parts.get("s") || "").split(" ").filter(Boolean).map(keyOfName).filter(exists);
}

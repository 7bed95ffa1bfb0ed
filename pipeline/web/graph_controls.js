"use strict";
// Sliders, boxes and buttons; the page starts at the end of this file.

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
  for (const one of document.querySelectorAll("#legend button"))
    one.setAttribute("aria-pressed", String(!off.includes(one.dataset.kind)));
}

function changes(id, key, read, kind = "change") {
  $(id).addEventListener(kind, (event) => {
    state[key] = read(event.target);
    draw();
  });
}
for (const id of ["n", "e", "d"]) changes(id, id, (input) => Number(input.value), "input");
changes("labels", "l", (input) => input.value);
changes("width", "w", (input) => input.value);
changes("only", "o", (input) => Number(input.checked));
$("n").max = data.thresholds.most;
$("collapsed").addEventListener("change", (event) => {
  for (const one of state.groups) one.open = !event.target.checked;
  state.selected = state.selected.filter((key) => !isGroup(key));
  draw();
});

function hide(kind) {
  const off = new Set(String(state.h).split(" ").filter(Boolean));
  if (!off.delete(kind)) off.add(kind);
  state.h = [...off].join(" ");
  draw();
}
for (const kind of KINDS.filter((one) => one !== "logit" && graph.nodes.some((node) => node.kind === one))) {
  const about = "show or hide; what is hidden still counts in every sum";
  $("legend").append(html("button", { "data-kind": kind, title: about, onclick: () => hide(kind) }, icon(kind), ONE[kind]));
}

$("save").addEventListener("click", () => {
  const file = new Blob([JSON.stringify(remember(), null, 1)], { type: "application/json" });
  const link = html("a", { download: data.slug + ".supernodes.json", href: URL.createObjectURL(file) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
$("open").addEventListener("change", async (event) => {
  const text = await event.target.files[0].text();
  event.target.value = "";
  const given = parsed(text), groups = given && listed(given.supernodes);
  if (!groups) return say("that file holds no groups; give one that “save” wrote");
  setGroups(groups);
  state.pinned = new Set((given.pinned || []).filter((id) => byId.has(id)).map((id) => byId.get(id).i));
  state.selected = [];
  remember();
  return draw();
});
$("reset").addEventListener("click", () => {
  Object.assign(state, defaults, { path: -1, selected: [], pinned: new Set() });
  setGroups(data.supernodes);
  remember();
  draw();
});

readAddress();
draw();
document.body.dataset.drawn = "yes";

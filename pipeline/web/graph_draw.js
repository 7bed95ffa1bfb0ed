"use strict";
// The picture: one SVG. Texts are always set as texts, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const MARKS = {
  feature: (r) => svg("circle", { r }),
  error: (r) => svg("rect", { x: -r * 0.85, y: -r * 0.85, width: 1.7 * r, height: 1.7 * r }),
  token: (r) => svg("rect", { x: -r * 1.25, y: -r * 0.8, width: 2.5 * r, height: 1.6 * r, rx: r * 0.8 }),
  position: (r) => svg("path", { d: `M0 ${-r}L${r} ${r * 0.8}H${-r}Z` }),
  position_0: (r) => svg("path", { d: `M${-r} 0L${-r / 2} ${-r * 0.9}H${r / 2}L${r} 0L${r / 2} ${r * 0.9}H${-r / 2}Z` }),
  rest: (r) => svg("path", { d: `M0 ${-r}V${r}M${-r} 0H${r}` }), // a plus
  bias: (r) => svg("path", { d: `M0 ${-r * 1.15}L${r * 1.15} 0L0 ${r * 1.15}L${-r * 1.15} 0Z` }),
  logit: (r) => svg("path", { d: `M${-r} ${r * 0.85}V${-r * 0.1}L0 ${-r}L${r} ${-r * 0.1}V${r * 0.85}Z` }),
};

function mark(kind, radius = 5) {
  const made = MARKS[kind](radius);
  made.setAttribute("class", "mark " + kind);
  return made;
}

// A mark among text.
function icon(kind) {
  return svg("svg", { class: "icon", viewBox: "-7 -7 14 14", width: 13, height: 13, "aria-hidden": "true" }, mark(kind, 5));
}

function curve(a, b) {
  const up = Math.max(10, Math.abs(a.y - b.y) * 0.42);
  const from = a.box ? 10 : a.radius, to = b.box ? 10 : b.radius;
  if (Math.abs(a.y - b.y) < 14) {
    const low = Math.min(a.y, b.y) - 20;
    return `M${a.x} ${a.y - from}C${a.x} ${low} ${b.x} ${low} ${b.x} ${b.y - to}`;
  }
  return `M${a.x} ${a.y - from}C${a.x} ${a.y - from - up} ${b.x} ${b.y + to + up} ${b.x} ${b.y + to}`;
}

function drawEdges(edges, heaviest, name) {
  const group = svg("g", { class: "edges " + name });
  for (const edge of [...edges].sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight))) {
    const share = Math.min(1, Math.abs(edge.weight) / heaviest);
    group.append(svg("path", {
      d: curve(edge.from, edge.to), class: edge.weight < 0 ? "edge negative" : "edge positive",
      "data-from": edge.from.key, "data-to": edge.to.key,
      "stroke-width": (0.7 + 6.3 * share).toFixed(2), "stroke-opacity": (0.24 + 0.6 * Math.sqrt(share)).toFixed(2),
    }));
  }
  return group;
}

function drawItem(item, classes) {
  const transform = `translate(${item.x.toFixed(1)} ${item.y.toFixed(1)})`;
  const made = svg("g", { class: `node ${item.kind} ${classes}`, "data-key": item.key, transform });
  if (item.box) {
    made.append(svg("rect", { class: "box", x: -item.width / 2 + 4, y: -10, width: item.width - 8, height: 20, rx: 6 }));
    const text = svg("text", { class: "label", "text-anchor": "middle", y: 4 });
    text.textContent = item.shown;
    made.append(text);
    return made;
  }
  made.append(svg("circle", { class: "halo", r: item.radius + 2.5 }), mark(item.kind, item.radius));
  if (item.shown) {
    const { dx, dy, anchor } = item.tag || { dx: item.radius + 4, dy: 0, anchor: "start" };
    const text = svg("text", { class: "label", x: dx, y: dy + 4, "text-anchor": anchor });
    text.textContent = item.shown;
    made.append(text);
  }
  return made;
}

function bands(placed, tokens) {
  const group = svg("g", { class: "bands" });
  tokens.forEach((_, c) => {
    if (c % 2 === 0) group.append(svg("rect", { x: placed.x[c + 1], y: 0, width: placed.column[c + 1], height: placed.plot }));
  });
  placed.rows.middle.forEach((y, row) => {
    const line = y - placed.rows.tall[row] / 2 - placed.rows.gap / 2;
    if (row < placed.rows.middle.length - 1) group.append(svg("line", { x1: 0, x2: placed.width, y1: line, y2: line }));
  });
  return group;
}

function rowNames(placed, names) {
  const group = svg("g", { class: "row-names" });
  group.append(svg("rect", { class: "cover", x: 0, y: 0, width: LEFT - 4, height: placed.plot }));
  placed.rows.middle.forEach((y, row) => {
    const text = svg("text", { x: 6, y: y + 4 });
    text.textContent = names[row];
    group.append(text);
  });
  return group;
}

function tokenAxis(placed, tokens, keys, chosen) {
  const group = svg("g", { class: "axis" });
  group.append(svg("rect", { class: "cover", x: 0, y: 0, width: placed.width, height: placed.axis }));
  group.append(svg("line", { x1: 0, x2: placed.width, y1: 0.5, y2: 0.5 }));
  tokens.forEach((token, c) => {
    const middle = placed.x[c + 1] + placed.column[c + 1] / 2;
    const place = placed.rotated
      ? { transform: `translate(${middle + 4} 11) rotate(-60)`, "text-anchor": "end" }
      : { x: middle, y: 19, "text-anchor": "middle" };
    const text = svg("text", { ...place, class: chosen.has(keys[c]) ? "selected" : "", "data-key": keys[c] });
    text.textContent = clip(token);
    group.append(text);
  });
  return group;
}

"use strict";
// What stands beside the picture: of the whole graph, of a node, of a group.

function html(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const SOURCES = { feature: "features", error: "errors", token: "tokens", position: "positions", position_0: "MLPs at position 0", rest: "features cut by the limit", bias: "biases", logit: "outputs", outside: "left out of this page" };
const ONE = { feature: "feature", error: "error", token: "token", position: "position", position_0: "MLP at position 0", rest: "features cut", bias: "bias", logit: "output" };

function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", "−");
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);
function percent(value) {
  const p = 100 * value;
  return (p >= 10 ? p.toFixed(0) : p >= 0.95 ? p.toFixed(1) : p >= 0.01 ? p.toFixed(2) : p > 0 ? "<0.01" : "0") + " %";
}

function where(node, data) {
  const at = node.position >= 0 ? `“${plainToken(data.tokens[node.position])}” (${node.position})` : "";
  if (node.kind === "feature") return `layer ${node.layer} at ${at}`;
  if (node.kind === "bias") return node.layer === data.n_layers ? "final norm and unembedding" : `layer ${node.layer}`;
  if (node.kind === "token" || node.kind === "position") return `position ${node.position}`;
  return node.kind === "logit" ? `after ${at}` : `layer ${node.layer} at ${at}`;
}

function facts(pairs) {
  const list = html("dl", { class: "facts" });
  for (const [name, value, title] of pairs) if (value !== "" && value !== null && value !== undefined) list.append(html("div", { title }, html("dt", {}, name), html("dd", {}, value)));
  return list;
}

// A list of edges, the largest first: as wide as its weight, a click walks to the other end.
function edgeList(rows, title, note, walk, first = 8) {
  const section = html("section", { class: "edge-list" }, html("h3", {}, title, html("small", {}, note)));
  const largest = Math.max(1e-30, ...rows.map((row) => Math.abs(row.weight)));
  const list = html("ol");
  const add = (row) => list.append(html("li", {}, html("button", { class: "walk" + (row.there ? "" : " pruned"), "data-key": row.key, title: row.title, onclick: () => walk(row) },
    html("i", { class: row.weight < 0 ? "bar negative" : "bar positive", style: `width:${(100 * Math.abs(row.weight) / largest).toFixed(1)}%` }),
    icon(row.kind), html("span", { class: "name" }, row.label), html("span", { class: "at" }, row.at),
    html("b", {}, signed(row.weight)), html("span", { class: "share" }, percent(row.share)))));
  rows.slice(0, first).forEach(add);
  section.append(list);
  if (rows.length > first) {
    const more = html("button", { class: "more" }, `all ${rows.length}`);
    more.addEventListener("click", () => { rows.slice(first).forEach(add); more.remove(); });
    section.append(more);
  }
  if (!rows.length) section.append(html("p", { class: "soft" }, "none"));
  return section;
}

// What the inputs of a target add up to, kind by kind.
function account(sums, value, unit) {
  const table = html("table", { class: "account" }), largest = Math.max(1e-30, ...sums.map(([, sum]) => Math.abs(sum)));
  for (const [kind, sum, count] of sums) {
    const bar = html("i", { class: sum < 0 ? "bar negative" : "bar positive", style: `width:${(48 * Math.abs(sum) / largest).toFixed(1)}%;${sum < 0 ? "right:50%" : "left:50%"}` });
    table.append(html("tr", {}, html("th", {}, kind === "outside" ? "" : icon(kind), `${count} ${SOURCES[kind]}`), html("td", { class: "bars" }, bar), html("td", {}, signed(sum))));
  }
  table.append(html("tr", { class: "sum" }, html("th", {}, unit), html("td"), html("td", {}, signed(value))));
  return table;
}

function context(example, strings, most, peakOf) {
  const line = html("p", { class: "context" });
  example[0].forEach((word, at) => {
    const act = example[1][at];
    const share = act > 0 ? Math.sqrt(Math.min(1, act / most)) : 0;
    // The blank before a word is not coloured: it may end up at the end of a line.
    const [, blank, rest] = /^( *)([^]*)$/.exec(seenToken(strings[word]));
    if (at > 0) line.append(blank);
    line.append(html("span", act > 0 ? { class: "on" + (at === peakOf ? " peak" : ""), style: `--a:${(0.1 + 0.75 * share).toFixed(2)}`, title: number(act) } : {}, rest || "␣"));
  });
  return line;
}
const seenToken = (text) => text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");

function histogram(counts, low, high, activation) {
  const w = 300, h = 46, most = Math.max(...counts, 1), step = w / counts.length;
  const plot = svg("svg", { class: "histogram", viewBox: `0 0 ${w} ${h + 14}`, role: "img", "aria-label": "histogram of activations" });
  counts.forEach((count, i) => {
    const tall = count ? Math.max(1, (h - 4) * Math.log1p(count) / Math.log1p(most)) : 0;
    plot.append(svg("rect", { x: i * step + 0.5, y: h - tall, width: Math.max(0.5, step - 1), height: tall }));
  });
  if (activation > 0 && high > low) {
    const x = Math.min(w - 1, Math.max(1, (activation - low) / (high - low) * w));
    plot.append(svg("line", { x1: x, x2: x, y1: 0, y2: h, class: "here" }));
  }
  const ends = [[0, "start", number(low)], [w, "end", number(high)]];
  for (const [x, anchor, text] of ends) {
    const label = svg("text", { x, y: h + 11, "text-anchor": anchor });
    label.textContent = text;
    plot.append(label);
  }
  return plot;
}

function featurePart(feature, strings, node) {
  const part = html("section", { class: "feature-data" }, html("h3", {}, "Top contexts", html("small", {}, feature.frequency === null ? "" : `active on ${percent(feature.frequency)} of tokens`)));
  const more = html("div", { hidden: true });
  feature.contexts.forEach(([name, examples], group) => {
    const place = group === 0 ? part : more;
    if (group > 0) more.append(html("h4", {}, name));
    examples.forEach((example, i) => {
      const peak = example[1].indexOf(Math.max(...example[1]));
      (group === 0 && i < 3 ? place : more).append(context(example, strings, feature.range[1] || 1, peak));
    });
  });
  if (more.children.length) part.append(html("button", { class: "more", onclick: (event) => { more.hidden = false; event.target.remove(); } }, "more contexts"), more);
  if (feature.top.length || feature.bottom.length) {
    const words = (list, kind) => html("p", { class: "words " + kind }, ...list.map((word) => html("span", {}, plainToken(strings[word]))));
    part.append(html("h3", {}, "Raises and lowers the outputs"), words(feature.top, "positive"), words(feature.bottom, "negative"));
  }
  if (feature.histogram.length) part.append(html("h3", {}, "Activations", html("small", {}, "counts on a log scale; the line is this prompt's")), histogram(feature.histogram, feature.range[0], feature.range[1], node.activation));
  return part;
}

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

const ONE = {
  feature: "feature", error: "error", token: "token", position: "position", position_0: "MLP at position 0",
  rest: "features cut", bias: "bias", logit: "output",
};
const SEVERAL = {
  feature: "features", error: "errors", token: "tokens", position: "positions", position_0: "MLPs at position 0",
  rest: "features cut by the limit", bias: "biases", logit: "outputs", outside: "left out of this page",
};

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
  for (const [name, value, about] of pairs)
    if (value !== "" && value !== null) list.append(html("div", { title: about }, html("dt", {}, name), html("dd", {}, value)));
  return list;
}

function section(heading, note, ...children) {
  return html("section", {}, html("h3", {}, heading, note && html("small", {}, note)), ...children);
}

const button = (text, onclick, key = "", id = null) => html("button", { id, onclick }, text, key && html("kbd", {}, key));
const spread = (part, whole) => `width:${(100 * part / Math.max(whole, 1e-30)).toFixed(1)}%`;

// A line that can be clicked: { name, at, value, share, kind, bar: its width, sign, key, about, faint, on }.
function line(given, onclick) {
  const colour = given.sign === undefined ? "plain" : given.sign < 0 ? "negative" : "positive";
  return html("li", {}, html("button", {
    class: "walk" + (given.faint ? " pruned" : ""), "data-key": given.key, title: given.about, onclick,
    "aria-pressed": given.on === undefined ? null : String(given.on),
  },
  given.bar && html("i", { class: "bar " + colour, style: given.bar }), given.kind && icon(given.kind),
  html("span", { class: "name" }, given.name), html("span", { class: "at" }, given.at || ""),
  given.value && html("b", {}, given.value),
  given.share !== undefined && html("span", { class: "share" }, percent(given.share))));
}

// Edges, the largest first, each as wide as its weight; a click walks to the other end.
function edgeList(rows, heading, note, first = 8) {
  const largest = Math.max(...rows.map((row) => Math.abs(row.weight)));
  const list = html("ol"), found = section(heading, note, list);
  const add = (row) => list.append(line({
    ...row, sign: row.weight, bar: spread(Math.abs(row.weight), largest), value: signed(row.weight),
  }, () => select(row.key)));
  found.className = "edge-list";
  rows.slice(0, first).forEach(add);
  if (rows.length > first) {
    const more = html("button", { class: "more" }, `all ${rows.length}`);
    more.addEventListener("click", () => { rows.slice(first).forEach(add); more.remove(); });
    found.append(more);
  }
  if (!rows.length) found.append(html("p", { class: "soft" }, "none"));
  return found;
}

// What the inputs of a target add up to, kind by kind.
function account(sums, value, unit) {
  const table = html("table", { class: "account" }), largest = Math.max(1e-30, ...sums.map(([, sum]) => Math.abs(sum)));
  for (const [kind, sum, count] of sums) {
    const style = `width:${(48 * Math.abs(sum) / largest).toFixed(1)}%;${sum < 0 ? "right" : "left"}:50%`;
    const bar = html("i", { class: sum < 0 ? "bar negative" : "bar positive", style });
    const name = html("th", {}, kind !== "outside" && icon(kind), `${count} ${(count === 1 && ONE[kind]) || SEVERAL[kind]}`);
    table.append(html("tr", {}, name, html("td", { class: "bars" }, bar), html("td", {}, signed(sum))));
  }
  table.append(html("tr", { class: "sum" }, html("th", {}, unit), html("td"), html("td", {}, signed(value))));
  return table;
}

function context(example, strings, most, peakOf) {
  const words = html("p", { class: "context" });
  example[0].forEach((word, at) => {
    const act = example[1][at];
    const share = act > 0 ? Math.sqrt(Math.min(1, act / most)) : 0;
    // The blank before a word is not coloured: it may end up at the end of a line.
    const [, blank, rest] = /^( *)([^]*)$/.exec(seenToken(strings[word]));
    if (at > 0) words.append(blank);
    const style = `--a:${(0.1 + 0.75 * share).toFixed(2)}`, peak = at === peakOf ? " peak" : "";
    words.append(html("span", act > 0 ? { class: "on" + peak, style, title: number(act) } : {}, rest || "␣"));
  });
  return words;
}
const seenToken = (text) => text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");

function histogram(counts, low, high, activation) {
  const w = 300, h = 46, most = Math.max(...counts, 1), step = w / counts.length;
  const viewBox = `0 0 ${w} ${h + 14}`;
  const plot = svg("svg", { class: "histogram", viewBox, role: "img", "aria-label": "histogram of activations" });
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

function norms(values) {
  const most = Math.max(...values), plot = html("p", { class: "norms" });
  values.forEach((norm, layer) => {
    const bar = html("i", { style: `height:${(26 * norm / most).toFixed(1)}px` });
    plot.append(html("span", { title: `layer ${layer}: ${number(norm)}` }, bar, String(layer)));
  });
  return plot;
}

function featureParts(feature, strings, node) {
  const often = feature.frequency === null ? "" : `active on ${percent(feature.frequency)} of tokens`;
  const contexts = section("Top contexts", often), more = html("div", { hidden: true });
  contexts.className = "feature-data";
  feature.contexts.forEach(([name, examples], group) => {
    if (group > 0) more.append(html("h4", {}, name));
    examples.forEach((example, i) => {
      const peak = example[1].indexOf(Math.max(...example[1]));
      (group === 0 && i < 3 ? contexts : more).append(context(example, strings, feature.range[1] || 1, peak));
    });
  });
  const show = (event) => { more.hidden = false; event.target.remove(); };
  if (more.children.length) contexts.append(html("button", { class: "more", onclick: show }, "more contexts"), more);
  const parts = [contexts];
  const word = (number) => html("span", {}, plainToken(strings[number]));
  const words = (list, kind) => html("p", { class: "words " + kind }, ...list.map(word));
  if (feature.top.length || feature.bottom.length)
    parts.push(section("Raises and lowers the outputs", "", words(feature.top, "positive"), words(feature.bottom, "negative")));
  if (feature.norms.some((norm) => norm > 0))
    parts.push(section("Writes to layers", "norm of its decoder", norms(feature.norms)));
  if (feature.histogram.length) {
    const plot = histogram(feature.histogram, feature.range[0], feature.range[1], node.activation);
    parts.push(section("Activations", "counts on a log scale; the line is this prompt's", plot));
  }
  return parts;
}

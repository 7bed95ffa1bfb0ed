"use strict";
// Where everything stands: a row a layer, a column a position. What has a label is as wide as its text, the rest are
// small marks side by side; columns and rows take the room that they need and share what is left.

const FONT = '11.5px system-ui, -apple-system, "Segoe UI", sans-serif';
const LINE = 20, PAD = 8, LEFT = 62, LONGEST = 118, LABELS = 90;
const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();

function textWidth(text) {
  if (!widths.has(text)) {
    pen.font = FONT;
    widths.set(text, pen.measureText(text).width);
  }
  return widths.get(text);
}

function clip(text, most = LONGEST) {
  if (textWidth(text) <= most) return text;
  const letters = [...text];
  while (letters.length > 1 && textWidth(letters.join("") + "…") > most) letters.pop();
  return letters.join("").trimEnd() + "…";
}

// A token as it can be printed: no line breaks, no blank that is not seen.
function plainToken(text) {
  const seen = text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e]/g, "·");
  return seen.trim() || seen.replace(/ /g, "␣") || "∅";
}

// items: [{ row, column, radius, influence, label, labelled: may have one, box }]; sets x, y and shown (its text) of each.
// size: { width, height } that there is. labels: auto, all or none.
function layout(items, tokens, nRows, size, labels) {
  const candidates = items.filter((item) => item.labelled).sort((a, b) => b.influence - a.influence);
  let count = labels === "none" ? 0 : labels === "all" ? candidates.length : Math.min(candidates.length, LABELS);
  for (;;) {
    const shown = new Set(candidates.slice(0, count));
    for (const item of items) if (item.box || item.kind === "logit") shown.add(item);
    const placed = place(items, shown, tokens, nRows, size);
    if (labels !== "auto" || count <= 10) return placed;
    if (placed.width <= size.width + 1 && placed.height <= size.height * 1.35) return placed;
    count = Math.floor(count * 0.85);
  }
}

function extent(item, shown) {
  item.shown = shown.has(item) ? clip(item.label) : "";
  if (item.box) return textWidth(item.shown) + 24;
  return item.shown ? 2 * item.radius + 4 + textWidth(item.shown) + 12 : 2 * item.radius + 5;
}

function place(items, shown, tokens, nRows, size) {
  const cells = new Map(), nColumns = tokens.length + 1;
  for (const item of items) {
    item.width = extent(item, shown);
    const key = item.row * nColumns + item.column;
    if (!cells.has(key)) cells.set(key, { row: item.row, column: item.column, labelled: [], dots: [] });
    cells.get(key)[item.shown ? "labelled" : "dots"].push(item);
  }
  const least = new Array(nColumns).fill(0), need = new Array(nColumns).fill(0);
  for (const cell of cells.values()) {
    const side = Math.ceil(Math.sqrt(cell.dots.length * 2.2)) * Math.max(0, ...cell.dots.map((item) => item.width));
    const widest = Math.max(side, ...cell.labelled.map((item) => item.width));
    least[cell.column] = Math.max(least[cell.column], widest + 2 * PAD);
    need[cell.column] = Math.max(need[cell.column], cell.labelled.length + cell.dots.length / 6);
  }
  const { column, rotated } = columnWidths(least, need, tokens, size.width - LEFT);
  const x = [LEFT];
  column.forEach((w, c) => x.push(x[c] + w));
  const heights = new Array(nRows).fill(0);
  for (const cell of cells.values()) {
    fill(cell, column[cell.column] - 2 * PAD);
    heights[cell.row] = Math.max(heights[cell.row], cell.height);
  }
  const rows = rowPlaces(heights, size.height - axisHeight(tokens, rotated));
  for (const cell of cells.values()) {
    const middle = x[cell.column] + column[cell.column] / 2;
    let y = rows.middle[cell.row] - cell.height / 2;
    for (const line of cell.lines) {
      let at = middle - line.width / 2;
      for (const item of line.items) {
        item.x = item.box ? at + item.width / 2 : at + item.radius + 2;
        item.y = y + line.height / 2;
        item.left = at;
        at += item.width;
      }
      y += line.height;
    }
  }
  return { x, column, rows, rotated, width: x[nColumns], height: rows.height + axisHeight(tokens, rotated), axis: axisHeight(tokens, rotated), plot: rows.height };
}

function columnWidths(least, need, tokens, room) {
  const text = [0, ...tokens.map((token) => textWidth(clip(token)) + 18)];
  const flat = least.map((w, c) => Math.max(w, text[c]));
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const rotated = sum(flat) > room;
  const column = rotated ? least.map((w, c) => (c ? Math.max(w, 21) : w)) : flat;
  const free = room - sum(column), total = sum(need.map((v, c) => (c ? v + 0.6 : 0)));
  if (free > 0) column.forEach((w, c) => { if (c) column[c] = w + Math.min((free * (need[c] + 0.6)) / total, 260); });
  return { column, rotated };
}

// Lines of a cell: those with labels first, the strongest on top.
function fill(cell, room) {
  cell.lines = [];
  const order = (list) => list.sort((a, b) => KINDS.indexOf(a.kind) - KINDS.indexOf(b.kind) || b.influence - a.influence);
  const flow = (list, height) => {
    let line = null;
    for (const item of order(list)) {
      if (!line || line.width + item.width > room + 0.5) cell.lines.push((line = { items: [], width: 0, height }));
      line.items.push(item);
      line.width += item.width;
    }
  };
  flow(cell.labelled, LINE);
  flow(cell.dots, Math.max(0, ...cell.dots.map((item) => 2 * item.radius + 4)));
  cell.height = cell.lines.reduce((sum, line) => sum + line.height, 0);
}

function axisHeight(tokens, rotated) {
  if (!rotated) return 30;
  return 14 + 0.86 * Math.max(20, ...tokens.map((token) => textWidth(clip(token))));
}

function rowPlaces(heights, room) {
  const tall = heights.map((h) => Math.max(h, 14)), sum = tall.reduce((a, b) => a + b, 0);
  const gap = Math.min(Math.max((room - sum) / heights.length, heights.length > 14 ? 16 : 34), 96);
  const middle = new Array(heights.length);
  let y = gap / 2;
  for (let row = heights.length - 1; row >= 0; row--) {
    middle[row] = y + tall[row] / 2;
    y += tall[row] + gap;
  }
  return { middle, tall, gap, height: y - gap / 2 };
}

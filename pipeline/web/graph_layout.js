"use strict";
// Where everything stands: a row a layer, a column a position. What has a label is as wide as its text, the rest are
// small marks side by side; columns and rows take the room that they need and share what is left.

const FONT = '11.5px system-ui, -apple-system, "Segoe UI", sans-serif';
const LINE = 20, PAD = 8, LEFT = 62, LONGEST = 118, LABELS = 90;
const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();

function textWidth(text, bold = false) {
  const key = (bold ? "b" : "n") + text;
  if (!widths.has(key)) {
    pen.font = (bold ? "600 " : "") + FONT;
    widths.set(key, pen.measureText(text).width);
  }
  return widths.get(key);
}

function clip(text, most = LONGEST) {
  if (textWidth(text) <= most) return text;
  const letters = [...text];
  while (letters.length > 1 && textWidth(letters.join("") + "…") > most) letters.pop();
  return letters.join("").trimEnd() + "…";
}

// A token as it can be printed: no line breaks, no blank that is not seen.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e]/g;
function plainToken(text) {
  const seen = text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(UNSEEN, "·");
  return seen.trim() || seen.replace(/ /g, "␣") || "∅";
}

// items: [{ row, column, radius, influence, label, labelled: may have one, box }]; sets x, y and shown (its text) of each.
// size: { width, height } that there is. labels: auto, all or none. Where there is room all have a line of their own;
// else columns are as narrow as their marks, and the most influential nodes get a label where nothing is in its way.
function layout(items, tokens, nRows, size, labels) {
  const candidates = items.filter((item) => item.labelled).sort((a, b) => b.influence - a.influence);
  const always = items.filter((item) => item.box || item.kind === "logit");
  for (const item of items) item.tag = null;
  let count = labels === "none" ? 0 : candidates.length;
  if (labels === "auto" && count > LABELS) count = 0;
  // First as it is, then with some scrolling sideways, then downwards, then with fewer labels.
  const ways = labels === "all" ? [[1, Infinity]] : [[1, 1], [1.2, 1], [1.45, 1], [1, 1.25]];
  while (count > 0) {
    const shown = new Set([...always, ...candidates.slice(0, count)]);
    for (const [wide, tall] of ways) {
      const placed = place(items, shown, tokens, nRows, { width: size.width * wide, height: size.height }, false);
      if (labels === "all" || (placed.width <= size.width * wide + 1 && placed.height <= size.height * tall + 1)) return placed;
    }
    count = count > 0.7 * candidates.length ? Math.floor(count * 0.88) : 0;
  }
  const placed = place(items, new Set(always), tokens, nRows, size, labels === "auto");
  if (labels === "auto") tags(candidates.filter((item) => !item.shown), items, placed);
  return placed;
}

// A label right of its mark, or left, above or below, wherever it covers no mark and no other label.
function tags(candidates, items, placed) {
  const taken = items.map((item) => {
    const right = item.shown ? item.left + item.width - 6 : item.x + item.radius + 1;
    if (item.box) return { left: item.left + 2, right, top: item.y - 11, bottom: item.y + 11, item };
    return { left: item.x - item.radius - 1, right, top: item.y - item.radius - 1, bottom: item.y + item.radius + 1, item };
  });
  const apart = (a, b) => a.right <= b.left || a.left >= b.right || a.bottom <= b.top || a.top >= b.bottom;
  const free = (box) => box.left > LEFT && box.right < placed.width && box.top > 0 && box.bottom < placed.plot
    && taken.every((other) => other.item === box.item || apart(other, box));
  for (const item of candidates) {
    const text = clip(item.label, 92), w = textWidth(text) + 2, r = item.radius;
    const places = [
      [r + 4, 0, "start"], [-r - 4, 0, "end"], [0, -r - 8, "middle"], [0, r + 8, "middle"],
      [r, -r - 6, "start"], [r, r + 6, "start"], [-r, -r - 6, "end"], [-r, r + 6, "end"],
    ];
    for (const [dx, dy, anchor] of places) {
      const left = item.x + dx - (anchor === "end" ? w : anchor === "middle" ? w / 2 : 0);
      const box = { left, right: left + w, top: item.y + dy - 7, bottom: item.y + dy + 7, item };
      if (!free(box)) continue;
      taken.push({ ...box, item: null });
      item.shown = text;
      item.tag = { dx, dy, anchor };
      break;
    }
  }
}

function extent(item, shown) {
  item.shown = shown.has(item) ? clip(item.label) : "";
  if (item.box) return textWidth(item.shown, true) + 26;
  return item.shown ? 2 * item.radius + 4 + textWidth(item.shown, item.kind === "logit") + 12 : 2 * item.radius + 5;
}

function place(items, shown, tokens, nRows, size, tight) {
  const cells = new Map(), nColumns = tokens.length + 1;
  for (const item of items) {
    item.width = extent(item, shown);
    const key = item.row * nColumns + item.column;
    if (!cells.has(key)) cells.set(key, { row: item.row, column: item.column, labelled: [], dots: [] });
    cells.get(key)[item.shown ? "labelled" : "dots"].push(item);
  }
  const least = new Array(nColumns).fill(0), need = new Array(nColumns).fill(0);
  for (const cell of cells.values()) {
    const n = cell.dots.length, abreast = Math.min(n, Math.ceil(Math.sqrt(n * (tight ? 0.6 : 2.2))));
    const side = abreast * Math.max(0, ...cell.dots.map((item) => item.width));
    const widest = Math.max(0, ...cell.labelled.map((item) => item.width));
    least[cell.column] = Math.max(least[cell.column], side && side + 3, widest && widest + PAD);
    need[cell.column] = Math.max(need[cell.column], cell.labelled.length + cell.dots.length / (tight ? 2 : 6));
  }
  const { column, rotated } = columnWidths(least, need, tokens, size.width - LEFT);
  const x = [LEFT];
  column.forEach((w, c) => x.push(x[c] + w));
  const heights = new Array(nRows).fill(0);
  for (const cell of cells.values()) {
    fill(cell, column[cell.column] - 3);
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
  const axis = axisHeight(tokens, rotated);
  return { x, column, rows, rotated, width: x[nColumns], height: rows.height + axis, axis, plot: rows.height };
}

function columnWidths(least, need, tokens, room) {
  const text = [0, ...tokens.map((token) => textWidth(clip(token), true) + 18)];
  const flat = least.map((w, c) => Math.max(w, text[c]));
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const rotated = sum(flat) > room;
  const column = rotated ? least.map((w, c) => (c ? Math.max(w, 16) : w)) : flat;
  // What is left goes to columns with much in them, and then to all.
  const share = (weights, most) => {
    const free = room - sum(column), total = sum(weights);
    if (free > 0 && total > 0) weights.forEach((weight, c) => { column[c] += Math.min((free * weight) / total, most); });
  };
  share(need.map((v, c) => (c ? v + (rotated ? 0 : 0.6) : 0)), 280);
  share(need.map((_, c) => (c ? 1 : 0)), 120);
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
      if (item.box) line.height = Math.max(line.height, LINE + 5);
    }
  };
  flow(cell.labelled, LINE);
  flow(cell.dots, Math.max(0, ...cell.dots.map((item) => 2 * item.radius + 4)));
  cell.height = cell.lines.reduce((sum, line) => sum + line.height, 0);
}

function axisHeight(tokens, rotated) {
  if (!rotated) return 30;
  return 20 + 0.87 * Math.max(20, ...tokens.map((token) => textWidth(clip(token), true)));
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

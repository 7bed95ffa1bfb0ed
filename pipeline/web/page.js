"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

// The colours of the page's own style, for every axis of a figure.
function colours(layout) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const patch = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": of("--text") };
  for (const key of Object.keys(layout)) {
    if (!/^[xy]axis/.test(key)) continue;
    patch[key + ".gridcolor"] = of("--grid");
    patch[key + ".linecolor"] = of("--line");
    patch[key + ".tickcolor"] = of("--line");
  }
  return patch;
}

function draw(place) {
  if (place.dataset.drawn || place.offsetParent === null || place.closest("details:not([open])")) return;
  place.dataset.drawn = "yes";
  const figure = figures[place.dataset.figure];
  figure.layout.font = { family: 'system-ui, -apple-system, "Segoe UI", sans-serif', size: 12 };
  Plotly.newPlot(place, figure.data, figure.layout, settings).then(() => Plotly.relayout(place, colours(figure.layout)));
}

const drawAll = () => document.querySelectorAll(".plot").forEach(draw);
drawAll();
document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", drawAll));
dark.addEventListener("change", () => {
  for (const place of document.querySelectorAll(".plot[data-drawn]"))
    Plotly.relayout(place, colours(figures[place.dataset.figure].layout));
});

// Rows by the value of a cell; what was not measured stays at the end either way.
function sortBy(table, index, heading) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const numeric = heading.hasAttribute("data-numeric");
  const value = (row) => {
    const cell = row.children[index];
    if (!numeric) return cell.textContent.trim() || null;
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return descending ? -order : order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((heading, index) => heading.addEventListener("click", () => sortBy(table, index, heading)));

document.getElementById("all-columns")?.addEventListener("change", (event) => {
  document.body.classList.toggle("all-columns", event.target.checked);
});
document.getElementById("pick")?.addEventListener("change", (event) => {
  for (const part of document.querySelectorAll(".picked")) part.hidden = part.dataset.pick !== event.target.value;
  drawAll();
});

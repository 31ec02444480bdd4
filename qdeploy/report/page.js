"use strict";

// Tables: a press on a heading sorts by it, a text leaves only the rows that hold it.
function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => order(a.cells[column].innerText, b.cells[column].innerText) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

function order(a, b) {
  const x = parseFloat(a), y = parseFloat(b);
  return isNaN(x) || isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function filtered(box) {
  const input = box.querySelector("input"), said = box.querySelector("output");
  const rows = [...box.querySelectorAll("tbody tr")];
  box.querySelector(".controls").hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    said.textContent = shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
  });
}

// Histograms: columns of the values, with the chosen range over them.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 240, BELOW = 42, ABOVE = 22, BESIDE = 8;

function histograms(box) {
  const tensors = JSON.parse(box.querySelector(".ranges").textContent);
  const select = box.querySelector("select");
  const draw = () => show(box, tensors[select.selectedIndex]);
  const step = (by) => {
    select.selectedIndex = (select.selectedIndex + by + tensors.length) % tensors.length;
    draw();
  };
  box.hidden = false;
  select.addEventListener("change", draw);
  box.querySelector(".previous").addEventListener("click", () => step(-1));
  box.querySelector(".next").addEventListener("click", () => step(1));
  new ResizeObserver(draw).observe(box);
}

function show(box, [name, integer, scale, zeroPoint, range, observed, clipped, counts]) {
  const facts = [
    ["Stored as", integer], ["Range", `${digits(range[0])} to ${digits(range[1])}`],
    ["Seen", `${digits(observed[0])} to ${digits(observed[1])}`], ["Outside the range", `${digits(100 * clipped)} %`],
    ["Scale", digits(scale)], ["Zero point", String(zeroPoint)],
  ];
  box.querySelector("dl").replaceChildren(...facts.map(([term, fact]) => {
    const pair = document.createElement("div");
    pair.append(Object.assign(document.createElement("dt"), { textContent: term }),
      Object.assign(document.createElement("dd"), { textContent: fact }));
    return pair;
  }));
  const canvas = box.querySelector(".canvas"), width = Math.max(canvas.clientWidth, 240);
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label", `Histogram of ${name}: ${facts.map((fact) => fact.join(" ")).join(", ")}`);
  const low = Math.min(range[0], observed[0]), high = Math.max(range[1], observed[1]);
  const x = (value) => BESIDE + (value - low) / (high - low || 1) * (width - 2 * BESIDE);
  const floor = HEIGHT - BELOW, tallest = Math.log10(1 + Math.max(...counts));
  const [left, right] = range.map(x);
  svg.append(element("rect", { x: left, y: ABOVE, width: Math.max(right - left, 0), height: floor - ABOVE, class: "kept" }));
  const wide = (observed[1] - observed[0]) / counts.length;
  counts.forEach((count, index) => {
    if (!count) return;
    const start = observed[0] + index * wide, end = start + wide, middle = (start + end) / 2;
    const tall = Math.max(1, Math.log10(1 + count) / tallest * (floor - ABOVE - 6));
    const across = Math.max(1, x(end) - x(start) - 0.5);
    svg.append(element("rect", { x: wide ? x(start) : x(start) - 1.5, y: floor - tall, width: wide ? across : 3, height: tall,
      class: middle < range[0] - scale || middle > range[1] + scale ? "cut" : "counted" }));
  });
  svg.append(element("path", { d: `M${BESIDE} ${floor}H${width - BESIDE}`, class: "axis" }));
  for (const end of [left, right]) svg.append(element("path", { d: `M${end} ${ABOVE - 6}V${floor}`, class: "end" }));
  label(svg, left, ABOVE - 9, digits(range[0]), width);
  label(svg, right, ABOVE - 9, digits(range[1]), width);
  const below = low < 0 && high > 0 ? [low, 0, high] : [low, high];
  for (const value of below) label(svg, x(value), floor + 18, digits(value), width);
  canvas.replaceChildren(svg);
}

function label(svg, x, y, text, width) {
  const anchor = x < 30 ? "start" : x > width - 30 ? "end" : "middle";
  svg.append(Object.assign(element("text", { x, y, "text-anchor": anchor }), { textContent: text }));
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function digits(value) {
  return value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".filtered").forEach(filtered);
document.querySelectorAll(".histograms").forEach(histograms);

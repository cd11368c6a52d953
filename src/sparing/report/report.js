"use strict";

/* Sort a table by a click on a heading: numbers as numbers, empty cells always last. */
function sortBy(table, column, ascending) {
  const body = table.tBodies[0];
  const direction = ascending ? 1 : -1;
  const rows = Array.from(body.rows);
  const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column].dataset.key, b.cells[column].dataset.key];
    if (x === "" || y === "") return (x === "") - (y === "");
    return direction * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, ascending);
    });
  });
}

/* Draw the plots in the colours of the page, again whenever those change. */
function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const result = structuredClone(layout);
  Object.assign(result, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
  });
  for (const name of Object.keys(result)) {
    if (/^[xy]axis\d*$/.test(name)) {
      Object.assign(result[name], { gridcolor: colour("--line"), linecolor: colour("--soft"), zeroline: false });
    }
  }
  for (const text of result.annotations || []) text.font.color = colour("--soft");
  return result;
}

const plots = Array.from(document.querySelectorAll("script[data-plot]")).map((script) => ({
  element: document.getElementById(script.dataset.plot),
  spec: JSON.parse(script.textContent),
}));
const options = {
  responsive: true,
  displaylogo: false,
  showSendToCloud: false, // plotly.js would offer to upload the figures
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};

function draw() {
  for (const { element, spec } of plots) {
    Plotly.react(element, spec.data, themed(spec.layout), options);
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

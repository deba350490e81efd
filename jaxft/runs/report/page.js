"use strict";
// Sorts tables by their heads, and shows one of several plots. Without this script all rows and plots are there.

const said = document.getElementById("said");

function orderOf(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.innerText.trim();
  const order = cell.dataset.order;
  return order === undefined || order === "" ? null : Number(order);
}

function compared(a, b, numeric, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last
  return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sort(table, head) {
  const column = head.cellIndex;
  const numeric = head.classList.contains("number");
  const up = head.getAttribute("aria-sort") !== "ascending";
  const rows = [...table.tBodies[0].rows];
  const keyed = rows.map((row) => ({ row, key: orderOf(row, column, numeric) }));
  keyed.sort((one, other) => compared(one.key, other.key, numeric, up ? 1 : -1));
  table.tBodies[0].append(...keyed.map((one) => one.row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  said.textContent = `sorted by ${head.querySelector("button").textContent}, ${up ? "rising" : "falling"}`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(table, head));
  }
}

for (const choice of document.querySelectorAll(".choice")) {
  choice.classList.add("one");
  const figures = choice.querySelectorAll("figure");
  const show = () => {
    const chosen = Number(choice.querySelector("input:checked").value);
    figures.forEach((figure, at) => figure.classList.toggle("away", at !== chosen));
  };
  choice.addEventListener("change", show);
  show();
}

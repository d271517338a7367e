// A click on a column's head sorts the rows of each group by it, and by another click the other way round.
for (const table of document.querySelectorAll("table")) {
  if (table.classList.contains("scans")) saysWhatItIs(table);
  const heads = [...table.tHead.rows].at(-1).cells;
  for (const [column, head] of [...heads].entries()) {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.ariaSort !== "ascending";
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = up ? "ascending" : "descending";
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
        body.append(...rows.sort((a, b) => compare(a.cells[column], b.cells[column], up ? 1 : -1)));
      }
    });
  }
}

// A picture that was enlarged by a click or by the keyboard goes back on Escape.
addEventListener("keydown", (event) => { if (event.key === "Escape" && document.activeElement.matches("img")) document.activeElement.blur(); });

// A table that is laid out as cards has lost its roles, and is a table all the same to who has it read out.
function saysWhatItIs(table) {
  table.role = "table";
  for (const part of [table.tHead, ...table.tBodies]) part.role = "rowgroup";
  for (const row of table.rows) {
    row.role = "row";
    for (const cell of row.cells) cell.role = { col: "columnheader", row: "rowheader" }[cell.scope] ?? "cell";
  }
}

function compare(a, b, sign) {
  const [x, y] = [a, b].map((cell) => parseFloat(cell.textContent.replace("−", "-").replace("< ", "")));
  if (Number.isNaN(x) && Number.isNaN(y)) return sign * a.textContent.localeCompare(b.textContent);
  if (Number.isNaN(x)) return 1; // cells without a number stay last
  if (Number.isNaN(y)) return -1;
  return sign * (x - y);
}

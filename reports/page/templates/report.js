"use strict";
(function () {
  const tables = Array.from(document.querySelectorAll("table.sortable"));

  function compare(a, b, numeric) {
    // what is missing comes last in both directions
    if (a === "" || b === "") return null;
    return numeric ? Number(a) - Number(b) : a.localeCompare(b);
  }

  function sort(table, index) {
    const heads = Array.from(table.tHead.rows[0].cells);
    const head = heads[index];
    const descending = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.hasAttribute("data-numeric");
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[index].dataset.sort;
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((one, other) => {
      const a = key(one), b = key(other), order = compare(a, b, numeric);
      if (order === null) return (a === "") - (b === "");
      return descending ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }

  tables.forEach((table) => {
    Array.from(table.tHead.rows[0].cells).forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => sort(table, index));
    });
  });

  const filter = document.getElementById("filter");
  const count = document.getElementById("count");

  function apply() {
    const wanted = filter.value.trim().toLowerCase();
    const rows = tables.flatMap((table) => Array.from(table.tBodies[0].rows));
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = wanted ? shown + " of " + rows.length + " rows" : "";
  }

  function reveal() {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  }

  window.addEventListener("hashchange", reveal);
  reveal();

  if (filter) {
    filter.closest("p").hidden = false;
    filter.addEventListener("input", apply);
  }
})();

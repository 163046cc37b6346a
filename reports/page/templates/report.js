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
    const seen = tables.filter((table) => !table.closest("[data-view]").hidden);
    const rows = seen.flatMap((table) => Array.from(table.tBodies[0].rows));
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = wanted ? shown + " of " + rows.length + " rows" : "";
  }

  // a browser may refuse storage to a page from disk: choices then last as long as the page
  function kept(name) {
    try { return localStorage.getItem("rvaudit." + name); } catch { return null; }
  }

  function keep(name, value) {
    try { localStorage.setItem("rvaudit." + name, value); } catch { return; }
  }

  const view = document.getElementById("view");

  function look() {
    document.querySelectorAll("[data-view]").forEach((part) => {
      part.hidden = view.value !== "" && !part.dataset.view.split(" ").includes(view.value);
    });
    if (filter) apply();
  }

  if (view) {
    const words = Array.from(view.options, (option) => option.text);
    if (words.includes(kept("view"))) view.selectedIndex = words.indexOf(kept("view"));
    view.closest("p").hidden = false;
    view.addEventListener("change", () => { keep("view", view.selectedOptions[0].text); look(); });
    look();
  }

  const columns = document.querySelector(".columns");
  const boxes = columns ? Array.from(columns.querySelectorAll("input")) : [];

  function show() {
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    tables.forEach((table) => {
      Array.from(table.tHead.rows[0].cells).forEach((head, index) => {
        const off = hidden.has(head.dataset.key);
        head.hidden = off;
        Array.from(table.tBodies[0].rows).forEach((row) => { row.cells[index].hidden = off; });
      });
    });
  }

  function choose(chosen) {
    boxes.forEach((box) => { box.checked = box.value in chosen ? chosen[box.value] : box.defaultChecked; });
    show();
  }

  function chosen() {
    try { return JSON.parse(kept("columns")) || {}; } catch { return {}; }
  }

  if (columns) {
    columns.hidden = false;
    columns.addEventListener("change", () => {
      keep("columns", JSON.stringify({ ...chosen(), ...Object.fromEntries(boxes.map((box) => [box.value, box.checked])) }));
      show();
    });
    document.getElementById("default-columns").addEventListener("click", () => { keep("columns", "{}"); choose({}); });
    choose(chosen());
  }

  const tip = document.getElementById("tip");
  let told = null;

  function sentence(part) {
    if (part.dataset.tip) return part.dataset.tip;
    const meaning = document.getElementById(part.getAttribute("aria-describedby")).textContent;
    return part.dataset.particulars ? meaning + " Here: " + part.dataset.particulars : meaning;
  }

  function tell(part) {
    told = part;
    tip.textContent = sentence(part);
    tip.hidden = false;
    const at = part.getBoundingClientRect(), size = tip.getBoundingClientRect(), edge = 8;
    const room = document.documentElement.clientWidth - size.width - edge;
    const above = at.top - size.height - 4, below = at.bottom + 4;
    const fits = below + size.height < window.innerHeight || above < edge;
    tip.style.left = Math.max(edge, Math.min(at.left, room)) + "px";
    tip.style.top = (fits ? below : above) + "px";
  }

  function hush() {
    told = null;
    tip.hidden = true;
  }

  document.querySelectorAll(".flag, .spots a").forEach((part) => {
    part.addEventListener("pointerenter", () => tell(part));
    part.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hush(); });
    part.addEventListener("focus", () => tell(part));
    part.addEventListener("blur", hush);
  });
  document.querySelectorAll(".flag").forEach((part) => {
    part.addEventListener("click", (event) => { event.preventDefault(); tell(part); });
  });
  document.addEventListener("click", (event) => { if (told && !told.contains(event.target)) hush(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });
  window.addEventListener("scroll", hush, { passive: true });

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

"""The report in a real browser: sorting, filtering, keys, contrast, and names that try to break out."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.browser

CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.body.querySelectorAll("*")) {
    const words = Array.from(element.childNodes).some((n) => n.nodeType === 3 && n.data.trim());
    if (!words || !element.getClientRects().length || element.closest("script")) continue;
    const style = getComputedStyle(element);
    const ink = light(rgb(element instanceof SVGElement ? style.fill : style.color)), paper = light(under(element));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.tagName + "." + element.className + ": " + element.textContent];
  }
  return worst;
})()"""
TREE = """(() => {
  const walk = (e) => [e.tagName, e.getAttributeNames().sort().join(" "), ...Array.from(e.children, walk)];
  return JSON.stringify(walk(document.documentElement));
})()"""


def shown(browser, column):
    """Return the texts of a column in the rows that are visible."""
    cells = f"Array.from(document.querySelectorAll('tbody tr[class*=ranked]:not([hidden])'), (r) => r.cells[{column}]"
    return browser.evaluate(f"{cells}.innerText.trim())")


def test_a_fault_would_be_heard(browser, tmp_path):
    page = tmp_path / "faulty.html"
    page.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>console.error('x'); missing()</script>")
    browser.open(page)
    assert any("127.0.0.1" in url for url in browser.requests())
    assert len(browser.faults()) >= 3


def test_a_page_from_disk_asks_for_nothing_and_says_nothing(browser, written, mixed_zoo, audited):
    browser.open(written(audited(mixed_zoo)))
    assert browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })") is None
    assert browser.faults() == []
    assert browser.evaluate("Array.from(document.images).every((i) => i.complete && i.naturalWidth > 0)")


def test_keys_sort_both_ways_with_the_missing_last(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    rv = [record.rv for record in mixed_zoo if record.rv is not None]
    browser.evaluate("document.querySelectorAll('th button')[4].focus()")
    for direction, order in (("ascending", sorted(rv)), ("descending", sorted(rv, reverse=True))):
        browser.press("Enter", 13)
        texts = shown(browser, 4)
        assert [float(text.split()[0]) for text in texts[:-1]] == pytest.approx(order, abs=6e-4)
        assert texts[-1] == "–"
        assert browser.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == direction
        assert browser.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1
    assert browser.faults() == []


def test_every_column_sorts_both_ways(browser, written, mixed_zoo, audited):
    flags = [("saturated: at 6.2 nats",), (), ("unpinned: recorded",)]
    records = [replace(record, flags=flags[i % 3]) for i, record in enumerate(audited(mixed_zoo))]
    browser.open(written(records))
    columns = "Array.from(document.querySelector('.sortable').tHead.rows[0].cells, %s)"
    heads = browser.evaluate(columns % "(head) => [head.dataset.key, 'numeric' in head.dataset]")
    assert {"rank", "model", "rv", "flags"} <= {key for key, _ in heads}
    assert len(heads) >= 12
    for i, (key, numeric) in enumerate(heads):
        for descending in (False, True):
            values, state = browser.evaluate(f"""(() => {{
              const table = document.querySelector(".sortable"), head = table.tHead.rows[0].cells[{i}];
              if ({str(not descending).lower()}) head.removeAttribute("aria-sort");
              head.querySelector("button").click();
              const values = Array.from(table.tBodies[0].rows, (row) => row.cells[{i}].dataset.sort);
              return [values, head.getAttribute("aria-sort")];
            }})()""")
            known = [value for value in values if value != ""]
            assert values == known + [""] * (len(values) - len(known)), key  # the missing come last
            assert state == ("descending" if descending else "ascending")
            if numeric:
                numbers = list(map(float, known))
                assert numbers == sorted(numbers, reverse=descending), key
            else:
                assert [text.lower() for text in known] == sorted((t.lower() for t in known), reverse=descending), key
    assert browser.faults() == []


def test_typing_filters_and_tells_how_many_are_left(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    assert browser.evaluate("document.getElementById('filter').labels[0].innerText.trim()") == "Filter"
    browser.evaluate("document.getElementById('filter').focus()")
    browser.send("Input.insertText", text="DenseNet")
    assert ["densenet" in text for text in shown(browser, 1)] == [True] * 3
    assert browser.evaluate("document.querySelector('[role=status]').innerText") == "3 of 12 rows"
    browser.evaluate("document.getElementById('filter').select()")
    browser.press("Backspace", 8)
    assert len(shown(browser, 1)) == 12


def test_tab_reaches_the_controls_and_shows_where_it_is(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    reached = []
    for _ in range(16):
        browser.press("Tab", 9)
        reached.append(browser.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        ))  # fmt: skip
    assert {tag for tag, _ in reached} >= {"A", "INPUT", "BUTTON", "DIV"}
    assert all(outline != "none" for _, outline in reached)


def test_a_model_in_the_table_leads_to_its_section(browser, written, mixed_zoo, audited):
    browser.open(written(audited(mixed_zoo)))
    browser.evaluate("document.querySelectorAll('th.model a')[3].click()")
    name = browser.evaluate("document.querySelectorAll('th.model a')[3].innerText")
    browser.evaluate("new Promise((go) => setTimeout(go, 50))")
    opened = "Array.from(document.querySelectorAll('details.model[open] > summary'), (s) => s.innerText)"
    assert browser.evaluate(opened) == [name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_a_phone_scrolls_in_boxes_only(browser, written, mixed_zoo, scheme, audited):
    browser.open(written(audited(mixed_zoo)), width=360, height=740, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate("Math.max(...Array.from(document.querySelectorAll('.scroll'), (s) => s.scrollWidth))") > 360
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_without_scripts_it_is_a_plain_table(browser, written, mixed_zoo):
    path = written(mixed_zoo)
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path)
        assert len(shown(browser, 1)) == 12
        assert browser.evaluate("document.querySelector('.filter').getClientRects().length") == 0
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_names_build_the_same_page_and_run_nothing(browser, written, hostile):
    tame = [replace(record, model=f"m{i}", family=f"f{i}", layer=f"l{i}", flags=(f"g{i}",)) for i, record in
            enumerate(hostile)]  # fmt: skip
    trees = []
    for name, records in (("tame.html", tame), ("hostile.html", hostile)):
        browser.open(written([replace(record, layer="logits", flags=()) for record in records], name))
        assert browser.faults() == []
        trees.append(browser.evaluate(TREE))
    assert trees[0] == trees[1]

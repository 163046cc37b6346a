"""Columns, views, flags and points in a real browser: choices survive, sentences appear, nothing is cut off."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.browser

HEADS = (
    "Array.from(document.querySelectorAll('.sortable thead th'), (h) => [h.dataset.key, h.getClientRects().length > 0])"
)
CUT_OFF = """Array.from(document.querySelectorAll('.sortable :is(th, td) *'))
  .map((e) => [e.textContent, e.getBoundingClientRect()])
  .filter(([, box]) => box.width && (box.left < 0 || box.right > document.documentElement.clientWidth))
  .map(([text]) => text)"""
TIP = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
PLACE = """(() => {
  const part = document.querySelector(%r);
  part.scrollIntoView({block: "center", behavior: "instant"});
  const box = part.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
})()"""
SATURATED = "the estimate says little but the number of images"


def full(records):
    made = {"certified_bound_population": 0.5, "best_head": "alf", "best_head_accuracy": 0.3, "passes": 1_234_567}
    probe = {"worst_probe_accuracy": 0.41, "worst_probe_accuracy_low": 0.38, "worst_probe_accuracy_high": 0.44}
    heads = {"natural_head": "slf", "adversarial_head": "alf"}
    return [replace(record, **made, **probe, **heads) for record in records]


def where(browser, selector):
    found = browser.evaluate(PLACE % selector)
    browser.settle()
    return found


def shown(browser):
    return {key for key, seen in browser.evaluate(HEADS) if seen}


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(browser, written, mixed_zoo, audited, width):
    browser.open(written(full(audited(mixed_zoo)[:-1])), width=width)
    browser.evaluate("(v => { v.value = ''; v.dispatchEvent(new Event('change')); })(document.getElementById('view'))")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "Array.from(document.querySelectorAll('.scroll:has(> .sortable)'), (s) => [s.scrollWidth, s.clientWidth])"
    assert all(content <= room for content, room in browser.evaluate(boxes))
    assert browser.evaluate(CUT_OFF) == []
    browser.evaluate("localStorage.clear()")


def test_chosen_columns_survive_another_page_and_go_back(browser, written, zoo):
    browser.open(written(full(zoo), "one.html"))
    browser.evaluate("localStorage.clear()")
    usual = shown(browser)
    assert {"rank", "model", "rv", "flags"} <= usual
    assert "family" not in usual
    browser.evaluate("document.querySelector('.columns').open = true")
    for key in ("rv", "family"):
        browser.evaluate(f"document.querySelector('.columns input[value={key}]').click()")
    assert shown(browser) == usual - {"rv"} | {"family"}
    browser.open(written(full(zoo[:5]), "two.html"))
    assert shown(browser) == usual - {"rv"} | {"family"}
    hidden = "document.querySelectorAll('.sortable tbody tr')[0].cells[4].getClientRects().length"
    assert browser.evaluate(hidden) == 0
    browser.evaluate("document.getElementById('default-columns').click()")
    assert shown(browser) == usual
    browser.open(written(full(zoo), "one.html"))
    assert shown(browser) == usual
    assert browser.faults() == []


def test_a_flag_tells_its_sentence_on_hover_focus_and_tap(browser, written, mixed_zoo):
    flags = ("saturated: at 6.2 nats", "unpinned: recorded")
    browser.open(written([replace(record, flags=flags) for record in mixed_zoo]))
    x, y = where(browser, ".flag")
    assert browser.evaluate(TIP) == ""
    browser.hover(x, y)
    browser.settle()
    assert browser.evaluate(TIP).startswith(SATURATED)
    assert browser.evaluate(TIP).endswith("Here: at 6.2 nats")
    browser.hover(5, 5)
    browser.settle()
    assert browser.evaluate(TIP) == ""
    browser.evaluate("document.querySelector('.flag').focus({preventScroll: true})")
    assert browser.evaluate(TIP).startswith(SATURATED)
    browser.press("Escape", 27)
    assert browser.evaluate(TIP) == ""
    browser.evaluate("document.activeElement.blur()")
    browser.tap(x, y)
    assert browser.evaluate(TIP).startswith(SATURATED)
    box = browser.evaluate("(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 1280
    assert browser.faults() == []


def test_a_point_of_a_figure_tells_its_model_and_leads_to_it(browser, written, zoo):
    browser.open(written(zoo))
    where(browser, ".spots")
    x, y = where(browser, ".spots a")
    browser.hover(x, y)
    browser.settle()
    told = browser.evaluate(TIP)
    assert told.startswith("baseline-h-standard: RV 1.300 ± 0.060")
    # the place lies over the point: the picture is drawn in the same units as the places over it
    ratio = """(() => { const svg = document.querySelector('.spots'), view = svg.viewBox.baseVal,
      box = svg.getBoundingClientRect(), image = svg.parentElement.querySelector('img');
      return [view.width / view.height, box.width / box.height, image.naturalWidth / image.naturalHeight]; })()"""
    first, second, third = browser.evaluate(ratio)
    assert first == pytest.approx(second, rel=0.01)
    assert first == pytest.approx(third, rel=0.01)
    browser.evaluate("document.querySelector('.spots a').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    browser.settle()
    assert (
        browser.evaluate("document.querySelector('details.model[open] > summary').innerText") == "baseline-h-standard"
    )


def test_a_view_shows_one_setting_and_is_kept(browser, written, zoo):
    records = [replace(record, cell_id=f"{record.cell_id}-{eps}", eps=eps) for record in zoo[:3] for eps in (0.1, 0.2)]
    browser.open(written(records))
    browser.evaluate("localStorage.clear()")
    seen = "filter((e) => e.getClientRects().length)"
    titles = f"Array.from(document.querySelectorAll('.setting h3')).{seen}.map((h) => h.innerText)"
    browser.open(written(records))
    assert browser.evaluate(titles) == ["digits, penultimate, ℓ∞ 0.2"]
    figures = f"Array.from(document.querySelectorAll('#figures figure')).{seen}.length"
    assert browser.evaluate(figures) == 2
    choose = "(v => { v.selectedIndex = %d; v.dispatchEvent(new Event('change')); })(document.getElementById('view'))"
    browser.evaluate(choose % 0)
    assert browser.evaluate(titles) == ["digits, penultimate, ℓ∞ 0.1"]
    browser.open(written(records, "again.html"))
    assert browser.evaluate(titles) == ["digits, penultimate, ℓ∞ 0.1"]
    browser.evaluate(choose % 2)
    assert len(browser.evaluate(titles)) == 2
    assert browser.evaluate(figures) == 4
    browser.evaluate("localStorage.clear()")
    assert browser.faults() == []

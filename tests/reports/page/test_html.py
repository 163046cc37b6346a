import base64
import re
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from reports.page.cells import HEADERS
from reports.page.drawings import spark
from reports.page.explanations import explain
from reports.page.html import render_report


class Page(HTMLParser):
    """The elements, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.words = [], [], {}, []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("script", "style"):
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def policy(self):
        return next(value for _, name, value in self.attributes if name == "content" and "default-src" in value)


@pytest.fixture
def page(mixed_page):
    return Page(mixed_page)


def test_the_policy_allows_this_script_and_style_only(page):
    for tag in ("script", "style"):
        assert page.tags.count(tag) == 1
        allowed = base64.b64encode(sha256(page.scripts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{allowed}'" in page.policy
    assert page.policy.startswith("default-src 'none'; img-src data:;")
    assert not any(name == "style" or name.startswith("on") for _, name, _ in page.attributes)


def test_nothing_is_fetched(page):
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/svg+xml;base64,", "#")), (tag, name, value)
    assert page.tags.count("link") == 0


def test_the_summary_says_who_is_refuted_and_who_failed(page):
    assert "12 audits of 12 models: 10 ranked, 1 contradicted, 1 failed." in page.text
    assert "baseline-h-robust is contradicted and not ranked: worst_nats 0.30 is under its floor 0.52; saturated." in (
        page.text
    )
    assert "bundled:resnet-quarter : the weights hold NaN" in page.text
    assert "8 of 8 comparisons hold" in page.text
    assert "RV against adversarial gap: Spearman rho 0.83" in page.text


def test_numbers_show_kind_unit_and_error(page):
    assert "0.530 ± 0.060" in page.text
    assert "0.957 [0.942, 0.967]" in page.text
    assert "nats, estimate" in page.text
    assert "fraction, measured" in page.text
    assert "estimated bound" in page.text
    assert "neither an upper nor a lower bound" in page.text
    assert "a measurement, or the worst case of a smaller ball, refutes the estimate" in page.text


def test_headers_are_keyboard_usable_and_say_how_they_sort(page):
    unfilled = {"worst-case probe", "best head", "no head exceeds", "passes"}
    unfilled |= {"no head exceeds, all images of their kind", "proved to stay right", "not broken"}
    assert page.tags.count("button") == len({header.title for header in HEADERS} - unfilled) + 1  # and the defaults
    assert ("th", "aria-sort", "ascending") in page.attributes
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(images) == 2
    assert all(images)


def test_details_of_every_model(page):
    assert "trained on the first 1,000 digits" in page.text
    assert "module.conv1.weight -> conv1.weight" in page.text
    assert page.tags.count("polyline") == 24


def test_details_may_be_missing_or_strange(zoo):
    deep = {}
    for _ in range(50):
        deep = {"deeper": deep}
    records = [replace(zoo[0], details={}), replace(zoo[1], details={"odd": [1, "</script>", None, [], deep, True]})]
    assert Page(render_report(records)).tags.count("script") == 1


def test_trust_and_unpinned_weights_are_announced(zoo):
    text = Page(render_report([replace(zoo[0], code_trusted=True, weights_pinned=False)])).text
    assert "User code was trusted to build: baseline-h-standard." in text
    assert "No hash of the weights was known beforehand for: baseline-h-standard." in text


def test_every_estimator_has_its_board_quantity_and_place(suite):
    page = Page(render_report(suite(models=4)))
    assert page.attributes.count(("table", "class", "sortable")) == 6
    assert "By sandwich: 2 of 2 comparisons hold" in page.text
    assert "24 audits of 4 models: 16 ranked, 0 contradicted, 0 failed; 8 by an estimator" in page.text
    assert "sandwich I(X; g(X) + noise)" in page.text
    assert "This estimator does not claim to rank models" in page.text
    assert "Fano accuracy bound" in page.text
    assert "sandwich and label-information, 4 models: Kendall tau-b" in page.text
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    titles = [re.sub(r"(Figure \d)\. .*, ([\w-]+)\. (RV|Small) .*", r"\1 \2", text) for text in images]
    assert titles[:6] == [
        "Figure 1 sandwich", "Figure 1 label-information", "Figure 2 label-information", "Figure 1 label-level",
        "Figure 1 mine-infonce", "Figure 2 mine-infonce",
    ]  # fmt: skip
    assert titles[6:8] == ["Figure 2 ref-local", "Figure 2 ref-mean"]
    assert len(images) == 9  # and the agreement


def test_two_estimators_in_any_order_give_the_same_page(suite, calibrated):
    records, rows = suite(models=2, estimators=["sandwich", "mine-infonce"]), calibrated()
    details = "<h2>Model by model</h2>"
    pages = [render_report(list(given), list(rows)) for given in (records, records[::-1])]
    assert details in pages[0]
    assert pages[0] == pages[1]


def test_the_same_records_give_the_same_page(zoo):
    assert render_report(zoo[:2]) == render_report(zoo[:2])


def test_several_groups_have_a_table_each(zoo):
    page = Page(render_report([replace(record, eps=0.1 if i < 2 else 0.2) for i, record in enumerate(zoo[:4])]))
    assert page.attributes.count(("table", "class", "sortable")) == 2


def test_every_sort_key_is_a_number_where_the_script_reads_one(mixed_zoo):
    html = render_report(mixed_zoo)
    cells = re.findall(r'<td class="number" data-label="[^"]*" data-sort="([^"]*)"', html)
    assert len(cells) > 12 * 8
    assert all(cell == "" or float(cell) == float(cell) for cell in cells)


def test_an_unknown_flag_is_explained_by_the_notes():
    assert explain("brand_new: 3") == "reported by the audit; see the notes of the model"
    assert explain("contradicted: worst_nats 0.3").startswith("a measurement, or the worst case of a smaller ball")


def test_only_numbers_make_a_curve():
    assert spark(["a"] * 9) == ""
    assert spark([0.0, float("nan")] * 9) == ""
    assert len(spark([1.0] * 9).split()) == 9
    assert len(spark(range(5000)).split()) == 60

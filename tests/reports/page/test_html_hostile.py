"""Names from outside are text: a hostile run builds the same page, element by element, as a benign one."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from reports.page.html import render_report

NAMES = (
    "</script></style></title><script>alert(1)</script>",
    "\"' onmouseover=alert(1) autofocus onfocus='alert(1)\"><img src=x onerror=alert(1)>",
    "safe\u202egnp.exe\u2066",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "=cmd|'/C calc'!A0",
    "../../../etc/passwd",
    "before\x00after \ud800",
    "m" * 300,
    "\u6a21\u578b \U0001f916 \u0646\u0645\u0648\u0630\u062c \u212b{{7*7}}{% raw %}",
    "javascript:alert(1)",
)
VOID = {"meta", "img", "input", "br", "link"}


class Tree(HTMLParser):
    """Every element with its path from the root and the names of its attributes, in the order of the page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(("/".join([*self._open, tag]), *sorted(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(("/".join([*self._open, tag]), *sorted(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.words.append(data)


def run(zoo, names, field):
    """Give ten audits a name each in one field, and what else a full record holds."""
    check = {"id": "gradient", "name": "gradient", "level": "trust", "passed": False}
    check |= {"figure": 0.1, "criterion": "finite"}
    line = {"validation": [[0, 0.0], [1, 1.0]], "training": [[0, 0.0], [1, 2.0]]}
    details = {"curves": [{"seed": 0, "normal": line, "worst": line}]}
    full = [
        replace(zoo[0], cell_id=f"c-{i}", rv=1.0 + i / 10, model=f"m{i}", checks=(check,), details=details)
        for i in range(len(names))
    ]
    return [_named(record, name, field) for record, name in zip(full, names, strict=True)]


def _named(record, name, field):
    if field == "flags":
        return replace(record, flags=(f"saturated: {name}",))
    if field == "checks":
        return replace(record, checks=({**record.checks[0], "name": name, "criterion": name, "reason": name},))
    if field == "details":
        return replace(record, details={**record.details, "notes": {"key": [name]}, "published": {name: name}})
    if field == "reason":
        return replace(record, status="failed", reason=name)
    return replace(record, **{field: name})


def test_ten_hostile_model_names_build_the_page_of_ten_benign_ones(zoo):
    hostile = Tree(render_report(run(zoo, NAMES, "model")))
    benign = Tree(render_report(run(zoo, [f"net-{i}" for i in range(10)], "model")))
    assert hostile.elements == benign.elements
    assert len(hostile.elements) > 1000


@pytest.mark.parametrize("field", ["family", "training", "best_head", "flags", "checks", "details", "reason"])
def test_hostile_words_elsewhere_do_neither(zoo, field):
    hostile = Tree(render_report(run(zoo, NAMES, field)))
    benign = Tree(render_report(run(zoo, [f"word-{i}" for i in range(10)], field)))
    assert hostile.elements == benign.elements


def test_hostile_words_that_all_records_share_do_neither(zoo):
    shared = ("dataset", "layer", "attack", "quantity", "weights_sha256", "certified_tier", "source")
    pages = []
    for word in (" ".join(NAMES), "word"):
        spoken = dict.fromkeys(shared, word)
        pages.append(Tree(render_report([replace(record, **spoken, certified_bound=0.5) for record in zoo[:2]])))
    assert pages[0].elements == pages[1].elements


def test_names_are_shown_as_they_read_and_do_nothing(zoo):
    text = render_report(run(zoo, NAMES, "model"))
    page = Tree(text)
    assert not any(name.startswith("on") or name == "style" for _, name, _ in page.attributes)
    links = [value for _, name, value in page.attributes if name in ("href", "src")]
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    words = "".join(page.words)
    for shown in (NAMES[0], NAMES[1], NAMES[4], NAMES[5], NAMES[7], NAMES[9], "{{7*7}}{% raw %}", "beforeafter"):
        assert shown in words
    assert not set("\x00\x1b\x07\u202e\u2066\ud800") & set(text)


def test_a_name_of_nothing_visible_still_has_a_link(zoo):
    page = Tree(render_report([replace(zoo[0], model="\u202e\x00")]))
    assert "".join(page.words).count("(no name)") == 2

"""The report in a real browser, driven over a pipe of the DevTools protocol: no library, nothing put into the page."""

import itertools
import json
import os
import select
import shutil
import time
from dataclasses import replace
from fcntl import F_DUPFD_CLOEXEC, fcntl

import pytest

from reports.page.html import render_report

CHROMIUM = os.environ.get("RVAUDIT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path, and RVAUDIT_CHROMIUM names none"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip
SECONDS = 60

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


def _pipes():
    """Yield both ends of two pipes, closed once the caller has copied them."""
    for _ in range(2):
        ends = os.pipe()
        yield from ends
        for end in ends:
            os.close(end)


class Browser:
    """A headless Chromium and one page of it."""

    def __init__(self, profile):
        # the protocol wants commands on descriptor 3 and answers on 4: ours lie above, so that neither is overwritten
        theirs_in, self._write, self._read, theirs_out = (fcntl(end, F_DUPFD_CLOEXEC, 10) for end in _pipes())
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_RDWR, 0) for end in (0, 1, 2)]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self.process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers, self._buffer, self.events, self._session = itertools.count(1), b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self._session = {}
        try:
            self.send("Browser.close")
        finally:
            os.close(self._write)  # Chromium ends with its pipe
            os.close(self._read)
            os.waitpid(self.process, 0)

    def send(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._await(lambda found: found.get("id") == number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _await(self, wanted):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            message, found, rest = self._buffer.partition(b"\0")
            if found:
                self._buffer = rest
                told = json.loads(message)
                if wanted(told):
                    return told
                self.events.append(told)
            elif select.select([self._read], [], [], 1)[0]:
                data = os.read(self._read, 1 << 20)
                assert data, "Chromium ended"
                self._buffer += data
        raise AssertionError("Chromium did not answer in time")

    def open(self, path, width=1280, height=900, scheme="light"):
        """Open a file at a width in CSS pixels, light or dark; what was heard before is forgotten."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._await(lambda told: told.get("method") == "Page.loadEventFired"))

    def evaluate(self, expression):
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def faults(self):
        """What the console said, and every request for anything but files and data inside the page."""
        self.evaluate("new Promise((go) => requestAnimationFrame(() => setTimeout(go, 50)))")
        told = [e["params"] for e in self.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
        told += [e["params"] for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        told += [e["params"] for e in self.events if e.get("method") == "Page.javascriptDialogOpening"]
        return told + [url for url in self.requests() if not url.startswith("data:")][1:]

    def requests(self):
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def written(tmp_path):
    def write(records, name="report.html"):
        (tmp_path / name).write_text(render_report(records), encoding="utf-8")
        return tmp_path / name

    return write


def shown(browser, column):
    """Return the texts of a column in the rows that are visible."""
    cells = f"Array.from(document.querySelectorAll('tbody tr[class*=ranked]:not([hidden])'), (r) => r.cells[{column}]"
    return browser.evaluate(f"{cells}.innerText.trim())")


def audited(records):
    """Give records what a full audit stores: curves, checks, several layers, a certificate, a long name."""
    curve = {"validation": [[10 * i, i / 30] for i in range(30)], "training": [[10 * i, i / 20] for i in range(30)]}
    check = {"id": "gradient", "name": "gradient", "level": "trust", "passed": True}
    check |= {"figure": 0.5, "criterion": "is finite"}
    checks = (check, {**check, "passed": False}, {**check, "passed": None, "reason": "no gradient to look at"})
    details = {**records[0].details, "curves": [{"seed": 0, "normal": curve, "worst": curve}]}
    full = [replace(record, details=details, checks=checks, certified_bound=0.4, certified_tier="proved",
                    flags=("saturated: at 6.2 nats",)) for record in records]  # fmt: skip
    deep = [replace(r, cell_id=f"{r.cell_id}-x", layer="features.0.conv", rv=0.2, flags=()) for r in full[:3]]
    return [*full, *deep, replace(full[-1], cell_id="long", model="m" * 300, rv=0.9)]


def test_a_fault_would_be_heard(browser, tmp_path):
    page = tmp_path / "faulty.html"
    page.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>console.error('x'); missing()</script>")
    browser.open(page)
    assert any("127.0.0.1" in url for url in browser.requests())
    assert len(browser.faults()) >= 3


def test_a_page_from_disk_asks_for_nothing_and_says_nothing(browser, written, mixed_zoo):
    browser.open(written(audited(mixed_zoo)))
    assert browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })") is None
    assert browser.faults() == []
    assert browser.evaluate("Array.from(document.images).every((i) => i.complete && i.naturalWidth > 0)")


def test_keys_sort_both_ways_with_the_missing_last(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    rv = [record.rv for record in mixed_zoo if record.rv is not None]
    browser.evaluate("document.querySelectorAll('th button')[2].focus()")
    for direction, order in (("ascending", sorted(rv)), ("descending", sorted(rv, reverse=True))):
        browser.press("Enter", 13)
        texts = shown(browser, 2)
        assert [float(text.split()[0]) for text in texts[:-1]] == pytest.approx(order, abs=6e-4)
        assert texts[-1] == "–"
        assert browser.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == direction
        assert browser.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1
    assert browser.faults() == []


def test_typing_filters_and_tells_how_many_are_left(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    assert browser.evaluate("document.getElementById('filter').labels[0].innerText.trim()") == "Filter"
    browser.evaluate("document.getElementById('filter').focus()")
    browser.send("Input.insertText", text="DenseNet")
    assert set(shown(browser, 6)) == {"densenet"}
    assert len(shown(browser, 1)) == 3
    assert browser.evaluate("document.querySelector('[role=status]').innerText") == "3 of 12 rows"
    browser.evaluate("document.getElementById('filter').select()")
    browser.press("Backspace", 8)
    assert len(shown(browser, 1)) == 12


def test_tab_reaches_the_controls_and_shows_where_it_is(browser, written, mixed_zoo):
    browser.open(written(mixed_zoo))
    reached = []
    for _ in range(12):
        browser.press("Tab", 9)
        reached.append(browser.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        ))  # fmt: skip
    assert {tag for tag, _ in reached} >= {"A", "INPUT", "BUTTON", "DIV"}
    assert all(outline != "none" for _, outline in reached)


def test_a_model_in_the_table_leads_to_its_section(browser, written, mixed_zoo):
    browser.open(written(audited(mixed_zoo)))
    browser.evaluate("document.querySelectorAll('th.model a')[3].click()")
    name = browser.evaluate("document.querySelectorAll('th.model a')[3].innerText")
    browser.evaluate("new Promise((go) => setTimeout(go, 50))")
    opened = "Array.from(document.querySelectorAll('details.model[open] > summary'), (s) => s.innerText)"
    assert browser.evaluate(opened) == [name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_a_phone_scrolls_in_boxes_only(browser, written, mixed_zoo, scheme):
    browser.open(written(audited(mixed_zoo)), width=360, height=740, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate("document.querySelector('.scroll').scrollWidth") > 360
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

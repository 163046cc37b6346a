"""A headless Chromium for the tests of the page, driven over a pipe of the DevTools protocol: no library."""

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
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip
SECONDS = 60


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

    def hover(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, pointerType="mouse")

    def tap(self, x, y):
        self.send("Emulation.setTouchEmulationEnabled", enabled=True)
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        self.settle()
        self.send("Emulation.setTouchEmulationEnabled", enabled=False)

    def settle(self):
        """Wait until what was sent to the page has been handled and drawn."""
        self.evaluate("new Promise((go) => requestAnimationFrame(() => setTimeout(go, 50)))")

    def faults(self):
        """What the console said, and every request for anything but files and data inside the page."""
        self.settle()
        told = [e["params"] for e in self.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
        told += [e["params"] for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        told += [e["params"] for e in self.events if e.get("method") == "Page.javascriptDialogOpening"]
        return told + [url for url in self.requests() if not url.startswith("data:")][1:]

    def requests(self):
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path, and RVAUDIT_CHROMIUM names none")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def written(tmp_path):
    def write(records, name="report.html"):
        (tmp_path / name).write_text(render_report(records), encoding="utf-8")
        return tmp_path / name

    return write


def audit_fully(records):
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


@pytest.fixture
def audited():
    return audit_fully

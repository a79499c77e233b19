"""A headless Chromium spoken to over a pipe, by the DevTools protocol: no driver, no port.

`see(page)` loads a file and gives a Tab; errors that the page raises or logs are collected.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATH = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FLAGS += ["--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe"]
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13}
PATIENCE = 120  # seconds for an answer, on a slow machine


class Silent(Exception):
    """The browser has gone, or answers no more."""


class Refused(Exception):
    """The browser does not do what it was asked for."""


class Tab:
    """One page. `errors`: exceptions, console errors and refused requests since it was opened.

    `out`: the descriptor that answers come from.
    """

    def __init__(self, to, out: int):
        self.to, self.out, self.read, self.numbers = to, out, b"", itertools.count(1)
        self.errors, self.seen, self.session = [], [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Call a method of the protocol; its result. Raises Refused, and Silent."""
        number, until = next(self.numbers), time.monotonic() + PATIENCE
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive(until)).get("id") != number:
            pass
        if "error" in answer:
            raise Refused(method, answer["error"])
        return answer["result"]

    def receive(self, until):
        """The next message, by the time `until`; what tells of an error is kept."""
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.out], [], [], max(0, until - time.monotonic()))
            if not ready or not (more := os.read(self.out, 2**20)):
                raise Silent("the browser has gone" if ready else "the browser does not answer")
            self.read += more
        data, _, self.read = self.read.partition(b"\0")
        message = json.loads(data)
        params, name = message.get("params", {}), message.get("method")
        if name == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        if name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(params["args"])
        if name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        if name == "Network.requestWillBeSent":
            self.seen.append(params["request"]["url"])
        return message

    def open(self, page: Path, width=1280, height=900, dark=False):
        """Load a file at a width, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("document.left = true")  # the same page may be opened again
        url = page.absolute().as_uri()
        self.send("Page.navigate", url=url)
        self.wait(f"!document.left && location.href === {json.dumps(url)}")
        return self

    def wait(self, expression):
        """Until a page is loaded whole of which `expression` holds."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with suppress(Refused):  # between two pages there is nobody to ask
                if self.ask(f"{expression} && document.readyState === 'complete'"):
                    return
            time.sleep(0.01)
        raise Silent(f"no page of which {expression}")

    def ask(self, expression):
        """The value of a script expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self):
        """Until the page has drawn what it was told to: what it has logged by then is kept."""
        drawn = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
        self.send("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def place(self, selector, across=0.5, down=0.5):
        """Where a point of an element is on the screen, once scrolled there."""
        name = json.dumps(selector)
        self.ask(f"document.querySelector({name}).scrollIntoView({{block: 'center'}})")
        box = self.ask(f"document.querySelector({name}).getBoundingClientRect().toJSON()")
        return {"x": box["x"] + across * box["width"], "y": box["y"] + down * box["height"]}

    def hover(self, selector, across=0.5, down=0.5):
        """Move the mouse over a point of an element."""
        at = self.place(selector, across, down)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)

    def click(self, selector, across=0.5, down=0.5):
        """Press and release the mouse there."""
        at = self.place(selector, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key):
        """A key, to whatever has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.send("Input.dispatchKeyEvent", type=kind, **code)

    def shoot(self, path: Path, whole=True):
        """A picture of the page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def text(self, selector):
        """What an element says."""
        return self.ask(f"document.querySelector({json.dumps(selector)}).innerText")


@contextmanager
def start(folder: Path):
    """A browser with its profile in `folder`: a Tab. The tests of who asks for one that does not
    start are skipped."""
    theirs_in, to = os.pipe()
    out, theirs_out = os.pipe()

    def rename():
        a, b = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(a, 3)
        os.dup2(b, 4)

    command = [PATH, *FLAGS, f"--user-data-dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=rename, close_fds=False, **quiet)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with os.fdopen(to, "wb", 0) as pipe, os.fdopen(out, "rb") as answers:
            tab = open_tab(pipe, answers.fileno())
            yield tab
            tab.session = None
            tab.send("Browser.close")
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def open_tab(pipe, out: int):
    """A Tab of the browser at these pipes, or a skip where it is not able to make one."""
    try:
        return Tab(pipe, out)
    except (Silent, OSError) as error:
        pytest.skip(f"{PATH} does not start here: {error}")

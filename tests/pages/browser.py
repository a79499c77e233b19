"""A headless Chromium spoken to over a pipe, by the DevTools protocol: no driver, no port.

`see(page)` loads a file and gives a Tab; errors that the page raises or logs are collected.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATH = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FLAGS += ["--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe"]
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13}


class Tab:
    """One page. `errors`: exceptions, console errors and refused requests since it was opened."""

    def __init__(self, to, out):
        self.to, self.out, self.numbers = to, out, itertools.count(1)
        self.errors, self.seen, self.session = [], [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Call a method of the protocol; its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while (answer := self.receive()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self):
        """The next message; what tells of an error is kept."""
        data = bytearray()
        while (byte := self.out.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
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
        if name:
            self.last = name
        return message

    def open(self, page: Path, width=1280, height=900, dark=False):
        """Load a file at a width, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.absolute().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass
        return self

    def ask(self, expression):
        """The value of a script expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

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
    """A browser with its profile in `folder`: a Tab."""
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
    with os.fdopen(to, "wb") as pipe, os.fdopen(out, "rb") as answers:
        try:
            tab = Tab(pipe, answers)
            yield tab
            tab.session = None
            tab.send("Browser.close")
        finally:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

"""The tour in a headless Chromium: nothing fails, and it follows clicks, mouse and keys."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reports.made_up import random_record

from gpt.reports import tour

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

CATCH = "<script>window.errors = []; onerror = (text) => { errors.push(text); };</script>"
HELPERS = """
const one = (selector) => document.querySelector(selector);
const say = (selector) => one(selector).innerText;
const press = (selector, key) =>
  one(selector).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""


def evaluate(page: str, script: str, folder: Path, width: int = 1280) -> dict:
    """What the function body `script` returns after `page` has run its own scripts."""
    report = "document.body.append(Object.assign(document.createElement('pre'), "
    report += "{ id: 'result', textContent: JSON.stringify({ errors, ...value }) }));"
    test = f"<script>{HELPERS} const value = (() => {{ {script} }})(); {report}</script>"
    path = folder / "page.html"
    page = page.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{test}</body>")
    path.write_text(page, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    if not done.stdout:
        pytest.skip(f"{BROWSER} does not start here: {done.stderr[-200:]}")
    text = re.search('<pre id="result">(.*?)</pre>', done.stdout, re.S)[1]
    result = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not result["errors"]
    return result


def test_the_tour_follows_clicks_mouse_and_keys(tmp_path):
    record, model = random_record(3, 4, 8, T=6, n_new=3)
    page = tour.build_tour(record, model, "x")
    script = """
    one(".thumb[title='layer 2, head 3']").click();
    const clicked = say("#cell");
    const box = one("#map").getBoundingClientRect();
    const at = { clientX: box.left + box.width * 0.25, clientY: box.top + box.height * 0.95 };
    one("#map").dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse", ...at }));
    const hovered = say("#cell");
    one("#tokens button:nth-child(4)").click();
    const token = say("#question"), scores = say("#scores");
    press("#map", "ArrowUp");
    const moved = say("#cell");
    press(".thumb[aria-checked=true]", "ArrowDown");
    const head = say("#cell");
    press("#steps button", "ArrowRight");
    const lens = say("#predicts"), query = say("#query"), answer = say("#answer");
    const step = say(".step:not(.away) h3"), width = document.documentElement.scrollWidth;
    return { clicked, hovered, token, scores, moved, head, lens, query, answer, step,
             width, innerWidth };"""
    for width in (1280, 500):
        seen = evaluate(page, script, tmp_path, width)
        assert seen["clicked"].startswith("Layer 2, head 3:") and seen["hovered"] != seen["clicked"]
        assert "(3) look" in seen["token"] and "−∞" in seen["scores"]  # later keys are masked
        assert "(2) gives" in seen["moved"] and seen["head"].startswith("Layer 3, head 3:")
        assert all("(2)" in seen[name] for name in ("lens", "query", "answer"))
        assert seen["step"].startswith("Decode step 1") and seen["width"] <= seen["innerWidth"]

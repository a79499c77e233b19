"""A self-contained HTML page: its frame, its escaping, and arrays packed for its script."""

import base64
import html
import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import require
from gpt.terminal import visible

# The browser sends no request, whatever a text in the page contains.
CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
MAX_UINT16 = 65535


def escape(text: Any) -> str:
    """Text for HTML. Control characters and direction overrides are shown as escapes."""
    return html.escape(visible(str(text)))


def build_page(title: str, body: str, script: str = "", data: Any = None) -> str:
    """The whole page. `body` is HTML; `script` names a file of this folder, which reads `data`."""
    scripts = ""
    if script:
        scripts = f"""<script type="application/json" id="data">{script_json(data)}</script>
<script>
{read_asset(script)}
</script>"""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{read_asset("page.css")}
</style>
</head>
<body>
{body}
{scripts}
</body>
</html>
"""


def read_asset(name: str) -> str:
    return (resources.files("gpt.reports") / name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON for a script element: no character in it can end the element or begin a tag."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(head: Iterable[str], rows: Iterable[Iterable[str]], css_class: str = "") -> str:
    """A table whose cells are HTML already; it scrolls sideways where it is too wide."""
    head_cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{css_class}">'
        f"<thead><tr>{head_cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def pack(array: np.ndarray, low: float | None = None, high: float | None = None) -> dict:
    """An array as base64, 16 bits per number, between its smallest and largest value or the bounds
    given. The error is at most half of `width` / 65535."""
    array = np.asarray(array, np.float32)
    if low is None:
        low = float(array.min(initial=0))
    if high is None:
        high = float(array.max(initial=0))
    width = (high - low) or 1.0
    levels = np.rint((np.clip(array, low, high) - low) / width * MAX_UINT16)
    data = base64.b64encode(levels.astype("<u2").tobytes()).decode()
    return {"shape": list(array.shape), "low": low, "width": width, "data": data}


def unpack(packed: dict) -> np.ndarray:
    """The array that tour.js reads from what `pack` returned."""
    levels = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(packed["shape"])
    return packed["low"] + levels.astype(np.float32) * packed["width"] / MAX_UINT16


def require_folder_path(flag: str, path: Path) -> None:
    """UserError unless `path` is a folder or one can be made there."""
    absolute = path.absolute()
    existing = next(place for place in (absolute, *absolute.parents) if place.exists())
    require(
        existing.is_dir(),
        f"{flag} {path}: {existing} is not a folder; expected a folder, or a path that is free",
    )


def write(path: Path, text: str) -> None:
    """Write the page atomically. Characters that UTF-8 does not have become `?`."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(text.encode("utf-8", "replace"))
    os.replace(unfinished, path)

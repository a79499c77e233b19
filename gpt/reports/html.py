"""One self-contained HTML file: its frame, its numbers, its safety. Knows no run and no model."""

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

# No request leaves the page, whatever a text in it may try.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
STEPS = 65535  # a number is kept as one of so many steps between the least and the largest


def escape(text: Any) -> str:
    """Text for HTML; what would move a cursor or turn the direction of reading is spelled out."""
    return html.escape(visible(str(text)))


def asset(name: str) -> str:
    """A file of this folder: style or script."""
    return (resources.files("gpt.reports") / name).read_text(encoding="utf-8")


def to_script(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends one or begins a tag."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def assemble(title: str, body: str, data: Any, script: str) -> str:
    """The whole page. `body` is HTML; `data` reaches the script file `script` as JSON."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{asset("page.css")}
</style>
</head>
<body>
{body}
<script type="application/json" id="data">{to_script(data)}</script>
<script>
{asset("page.js")}
{asset(script)}
</script>
</body>
</html>
"""


def require_place(flag: str, path: Path) -> None:
    """UserError unless a file can be made at `path`."""
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: there is no folder {folder}; make it")
    require(not path.is_dir(), f"{flag} {path}: is a folder; name a file in it")


def require_folder(flag: str, path: Path) -> None:
    """UserError if something else is where the folder `path` is to be, or one above it."""
    whole = path.absolute()
    met = next(place for place in (whole, *whole.parents) if place.exists())
    require(met.is_dir(), f"{flag} {path}: {met} is no folder; expected one, or nothing there yet")


def write(path: Path, text: str) -> None:
    """Put the page at `path`: whole, or not at all. Lone surrogates become `?`."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(text.encode("utf-8", "replace"))
    os.replace(aside, path)


def pack(array: np.ndarray, least: float | None = None, largest: float | None = None) -> dict:
    """An array as base64 of 16 bits a number, between its own bounds or those given."""
    array = np.asarray(array, np.float32)
    least = float(array.min(initial=0)) if least is None else least
    largest = float(array.max(initial=0)) if largest is None else largest
    width = (largest - least) or 1.0
    parts = np.rint((np.clip(array, least, largest) - least) / width * STEPS)
    data = base64.b64encode(parts.astype("<u2").tobytes()).decode()
    return {"shape": list(array.shape), "least": least, "width": width, "data": data}


def unpack(packed: dict) -> np.ndarray:
    """What the page's script makes of `pack`'s object."""
    parts = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(packed["shape"])
    return packed["least"] + parts.astype(np.float32) * packed["width"] / STEPS


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of cells that are HTML already, in a frame that scrolls where it is too wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )

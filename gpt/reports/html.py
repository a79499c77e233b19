"""The frame of a self-contained HTML page, and safe texts and tables for it."""

import html
from collections.abc import Iterable
from importlib import resources
from typing import Any

from gpt.terminal import visible

# No text in the page can make the browser send a request.
CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


def build_page(title: str, body: str, scripts: str = "") -> str:
    """The whole page; `body` and `scripts` are HTML."""
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


def escape(text: Any) -> str:
    """Text for HTML. Control characters and direction overrides are shown as escapes."""
    return html.escape(visible(str(text)))


def table(head: Iterable[str], rows: Iterable[Iterable[str]], css_class: str = "") -> str:
    """A table whose cells are HTML already; it scrolls sideways if too wide."""
    head_cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{css_class}">'
        f"<thead><tr>{head_cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )

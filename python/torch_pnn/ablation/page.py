"""The pieces of an HTML page that holds everything it shows: paragraphs, tables, figures, the document around them."""

from __future__ import annotations

import html
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .tables import Table


def escape(text: str) -> str:
    """Text that stays text inside elements and quoted attributes; a line never ends between a number and its "%"."""
    return html.escape(text, quote=True).replace(" %", "\u00a0%")


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    """A list of elements that are HTML already."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and what they are."""
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in values.items())
    return f"<dl>{pairs}</dl>"


def commands(lines: Sequence[str]) -> str:
    """Lines for a shell."""
    text = "\n".join(lines)
    return f"<pre tabindex='0'><code>{html.escape(text)}</code></pre>"


def _class(kind: str) -> str:
    return f" class='{kind}'" if kind else ""


def dot(variable: str) -> str:
    """A spot in one of the style sheet's colours."""
    return f"<span class='dot' style='background: var({variable})' aria-hidden='true'></span>"


def table(content: Table, marks: Mapping[str, str] | None = None) -> str:
    """A table that scrolls sideways where it has no room.

    Args:
        content: its first column names the rows.
        marks: HTML before the name of a row, by its key.
    """
    marks = marks or {}
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in content.head)
    body = []
    for index, (first, *rest) in enumerate(content.rows):
        mark = marks.get(content.keys[index], "") if content.keys else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        kind = _class("primary" if index in content.strong else "")
        body.append(f"<tr{kind}><th scope='row'>{mark}{escape(first)}</th>{cells}</tr>")
    caption = f"<caption><span>{escape(content.caption)}</span></caption>" if content.caption else ""
    label = escape(content.caption or "table")
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'><table>{caption}"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(heading: str, svg: str, caption: str, key: str = "") -> str:
    """A plot with its heading, an optional key (HTML), and a caption."""
    return f"<figure><h3>{escape(heading)}</h3>{svg}{key}<figcaption>{escape(caption)}</figcaption></figure>"


def section(heading: str, content: str) -> str:
    """A part of the page; nothing where there is no content."""
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def alarm(sentences: Sequence[str]) -> str:
    """What must not be overlooked, in one box; nothing where there is nothing."""
    if not sentences:
        return ""
    content = paragraph(sentences[0]) if len(sentences) == 1 else bullets(map(escape, sentences))
    return f"<div class='alarm' role='alert'>{content}</div>"


def document(title: str, body: str, settings: Any) -> str:
    """The whole page.

    Args:
        title: of the window.
        body: HTML.
        settings: JSON values for programs that read the page.
    """
    style = importlib.resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    # "<" is escaped so that no text can end the element.
    values = json.dumps(settings).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="settings">{values}</script>\n</body>\n</html>\n'
    )

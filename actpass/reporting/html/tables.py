"""Tables that scroll inside their own frame, and can be sorted by a click on a header."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actpass._format import megabytes
from actpass.reporting.html.markup import Child, Markup, element, join


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Child]], total: Sequence[Child] | None = None) -> Markup:
    """A cell is text, or what `cell` makes. total: a last row that stays last."""
    cells = [[_cell(content) for content in row] for row in rows]
    numbers = [cell.startswith('<td class="number"') for cell in cells[0]] if cells else [False] * len(header)
    head = [
        element("th", element("button", name, type="button"), scope="col", class_="number" if number else None)
        for name, number in zip(header, numbers, strict=True)
    ]
    foot = element("tfoot", element("tr", *map(_cell, total))) if total is not None else None
    body = element("tbody", *(element("tr", *row) for row in cells))
    inner = element("table", element("caption", caption), element("thead", element("tr", *head)), body, foot)
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(content: Child) -> Markup:
    return content if isinstance(content, Markup) and content.startswith("<td") else element("td", content)


def bytes_cell(nbytes: int) -> Markup:
    """A number of bytes; the exact one is what it is sorted by, and shown on hovering."""
    return element("td", megabytes(nbytes), class_="number", data_value=nbytes, title=f"{nbytes} B")


def number_cell(text: str, value: float) -> Markup:
    return element("td", text, class_="number", data_value=f"{value:g}")


def code_cell(text: str) -> Markup:
    """A path, a shape."""
    return element("td", element("code", text) if text else "-", class_="code")


def long_cell(text: str) -> Markup:
    """A sentence."""
    return element("td", text, class_="long")


def section(title: str, id_: str, *children: Child) -> Markup:
    return element("section", element("h2", title, id=id_), *children, aria_labelledby=id_)


def paragraphs(*texts: str) -> Markup:
    return join([element("p", text) for text in texts])

"""HTML that is built from values: whatever is not markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


Child = Markup | str | int | float | None | Iterable["Child"]
"""What an element may hold: markup as it is, all else escaped, None left out."""
_VOID = frozenset({"meta", "br"})


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An HTML element. An attribute's trailing underscore is dropped and the others become hyphens (``class_``,
    ``aria_label``); one that is None or False is left out, and True stands without a value."""
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Child) -> Markup:
    """Markup of ``children``, one behind the other."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, (str, int, float)):
        return Markup(escape(str(children)))
    return Markup("".join(map(join, children)))

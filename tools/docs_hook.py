"""A hook of mkdocs: a page's link to a file of the repository outside docs/ leads to a copy of that file in the site."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PLACE = "repository"
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to."""
    outside: set[str] = set()
    for file in list(files.documentation_pages()):
        outside |= {path for _, path in _links(file.content_string, file.src_uri) if path is not None}
    for path in sorted(outside):
        if not (ROOT / path).is_file():
            raise FileNotFoundError(f"a page links to {path}, which is no file of the repository")
        files.append(File.generated(config, f"{PLACE}/{path}", abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ lead to the copies."""
    uri = page.file.src_uri
    if uri.startswith(f"{PLACE}/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        path = _outside(match[2], uri)
        if path is None:
            return match[0]
        target = posixpath.relpath(f"{PLACE}/{path}", posixpath.dirname(uri) or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return _LINK.sub(moved, markdown)


def _links(text: str, uri: str) -> list[tuple[str, str | None]]:
    return [(m[2], _outside(m[2], uri)) for m in _LINK.finditer(text)]


def _outside(link: str, uri: str) -> str | None:
    """The path in the repository that a link of the page ``uri`` leads to, if it lies outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), link))
    return None if path.startswith(("docs/", "../")) else path

"""A hook of mkdocs: a page's link to a file of the repository outside docs/ leads to a copy of that file in the site."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES, COPIES = "docs/", "repository/"
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page, or an added page, links to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in _LINK.finditer(page.content_string):
            path = _path_of(link[2], page.src_uri)
            if path.startswith(PAGES) or files.get_file_from_path(COPIES + path):
                continue
            if not (ROOT / path).is_file():
                raise FileNotFoundError(f"{page.src_uri} links to {path}, which is no file of the repository")
            copy = File.generated(config, COPIES + path, abs_src_path=os.fspath(ROOT / path))
            files.append(copy)
            waiting += [copy] if copy.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead from page to page, or to the copies."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        path = _path_of(link[2], uri)
        target = path.removeprefix(PAGES) if path.startswith(PAGES) else COPIES + path
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link[3] or ''}"

    return _LINK.sub(moved, markdown)


def _path_of(link: str, uri: str) -> str:
    """The path in the repository that ``link`` leads to, on the page that is at ``uri`` in the site."""
    source = uri.removeprefix(COPIES) if uri.startswith(COPIES) else PAGES + uri
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))

"""The documents: what they show runs, what they link to exists, and the reference is what the package says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from actpass.torch_compat import FUSION_GATE, inductor_config

from .test_package import STAGES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")))
RUN = [README, *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
NOT_RUN = "<!-- not run:"
NEED_GATE = {"fit_a_budget.md"}


@dataclass(frozen=True)
class Block:
    """A block of Python in a page. line: its first. run: whether it is executed, not only compiled."""

    source: str
    line: int
    run: bool


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    starts = [i for i, line in enumerate(lines) if line == "```python"]
    for start in starts:
        end = lines.index("```", start)
        run = page in RUN and not lines[start - 1].startswith(NOT_RUN)
        yield Block("\n" * (start + 1) + "\n".join(lines[start + 1 : end]), start + 1, run)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_code_of_a_page_runs(page: Path, no_codegen: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    if page.name in NEED_GATE and not hasattr(inductor_config, FUSION_GATE[0]):
        pytest.skip("what this page asks for takes the gate on fusions of torch 2.15")
    names: dict[str, object] = {"__name__": page.stem}
    found = list(blocks(page))
    assert any(block.run for block in found)
    for block in found:
        code = compile(block.source, str(page), "exec")
        if block.run:
            exec(code, names)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in RUN], ids=name)
def test_code_of_other_pages_compiles(page: Path):
    for block in blocks(page):
        compile(block.source, str(page), "exec")


@pytest.mark.slow
def test_minimal_example_runs(no_codegen: None, capsys: pytest.CaptureFixture[str]):
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text().splitlines()) <= 30
    runpy.run_path(str(script), run_name="__main__")
    assert "actpass: active" in capsys.readouterr().out


@pytest.mark.slow
def test_notebook_runs(no_codegen: None, monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo 2.13 imports the module of what it traces
    notebook = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert not cell["outputs"]
        exec("".join(cell["source"]), vars(module))


def test_readme_fits_on_three_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_reference_is_what_the_package_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "make_reference", raising=False)
    import make_reference  # pyright: ignore[reportMissingImports]: on the path by the line above

    assert list(make_reference.stale()) == [], "run python tools/make_reference.py"


def test_reference_describes_every_option(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_reference  # pyright: ignore[reportMissingImports]: on the path by the line above

    text = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)`", text.partition("\n- ")[2]))
    assert not set(make_reference.known_options()) - described


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What a heading is linked by: lower case, without punctuation, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{name(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


def test_architecture_has_every_stage():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [stage for stage in STAGES if f"`{stage}`" not in text]


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.is_relative_to(ROOT / "docs")]
    assert not [page for page in pages if f": {page}\n" not in site]

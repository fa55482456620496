"""The page as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files

from actpass._format import megabytes
from actpass.memory.footprint import Footprint
from actpass.plan.pareto import add_up
from actpass.reporting.html.markup import Child, Markup, element, join
from actpass.reporting.html.peak import peak_section
from actpass.reporting.html.saved import saved_section, tensor_table
from actpass.reporting.html.tables import bytes_cell, code_cell, long_cell, number_cell, paragraphs, section, table
from actpass.reporting.html.tradeoff import tradeoff_section
from actpass.reporting.record import Record, Totals
from actpass.reporting.rows import folded_left_alone
from actpass.reporting.spectra import SubspaceRow
from actpass.reporting.spectra import folded as folded_subspaces

_FOOTPRINT = {
    "forward": "peak while the forward runs",
    "backward": "peak while the backward runs",
    "kept": "kept from the forward for the backward",
    "returned": "returned to the caller (the loss, logits)",
    "gradients": "gradients that the backward leaves behind",
    "passed": "gradients handed to the regions before",
    "tangents": "gradients given by the regions behind",
}
"""Field of a `Footprint` -> what it is."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What a page shows: the values of a `Report`. status: a sentence. versions: names and versions of what made it."""

    status: str
    active: bool
    regions: tuple[Record, ...]
    totals: Totals
    step_bytes: int | None
    plan_hash: str
    subspaces: tuple[SubspaceRow, ...]
    notes: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


def render(view: View) -> str:
    """``view`` as one HTML file that needs no other."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "actpass: what a training step saves for backward"),
        element("style", Markup(_text("style.css"))),
    )
    body = element(
        "body",
        element("a", "Skip to the numbers", href="#main", class_="skip"),
        _header(view),
        element("main", *_sections(view), id="main"),
        element("script", Markup(_text("sort.js"))),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _text(name: str) -> str:
    return files("actpass.reporting.html").joinpath(name).read_text(encoding="utf-8")


def _header(view: View) -> Markup:
    hashes = [("plan", code) for code in view.plan_hash.split("-") if code]
    made = [element("li", name, " ", element("code", text)) for name, text in (*hashes, *view.versions)]
    return element(
        "header",
        element("h1", "What this training step saves for backward"),
        element("p", f"{view.status}.", class_="status" if view.active else "status warning"),
        element("ul", *made, class_="made"),
    )


def _sections(view: View) -> Iterator[Markup]:
    if not view.regions:
        yield section(
            "Nothing to show yet",
            "empty",
            paragraphs("No graph with a forward and a backward was compiled. Run one training step and make the report then."),
        )
    else:
        yield _figures(view.totals, view.step_bytes)
        curves = [r.curves for r in view.regions if r.curves is not None]
        if len(curves) == len(view.regions):
            yield peak_section(curves)
        else:
            text = "The peak of a part of this step is not predicted; the notes say why."
            yield section("Memory over the step", "peak", paragraphs(text))
        yield saved_section([s for r in view.regions for s in r.sites])
        yield _regions(view.regions)
        tradeoffs = [r.tradeoff for r in view.regions if r.tradeoff is not None]
        if len(tradeoffs) == len(view.regions):
            yield tradeoff_section(add_up(tradeoffs))
        if view.subspaces:
            yield _subspaces(view.subspaces)
    if view.notes:
        yield section("Notes on the whole model", "notes", _list(view.notes))


def _figures(t: Totals, step_bytes: int | None) -> Markup:
    eager = f"eager mode: {megabytes(t.saved_bytes_eager)}" if t.saved_bytes_eager is not None else None
    cards = [_card("Saved for backward", t.saved_bytes, t.saved_bytes_default, eager)]
    if t.peak_bytes is not None and t.peak_bytes_default is not None:
        cards.append(_card("Predicted peak of forward and backward", t.peak_bytes, t.peak_bytes_default, None))
    if step_bytes is not None:
        there = f"of which {megabytes(t.resident_bytes or 0)} are parameters, inputs and optimizer state"
        cards.append(_plain_card("Predicted peak of the whole step", megabytes(step_bytes), there))
    now, before = t.backward_matmul_flops, t.backward_matmul_flops_default
    recomputed = f"recomputed: {t.extra_matmuls} matmuls, {t.extra_attention} attention"
    work = f"Inductor's default: {before / 1e9:.2f} GFLOP"
    cards.append(_plain_card("Matmuls of the backward", f"{now / 1e9:.2f} GFLOP", work, recomputed))
    return section("At a glance", "glance", element("div", *cards, class_="cards"))


def _card(title: str, now: int, before: int, more: str | None) -> Markup:
    change = f"{100 * now / before:.0f} % of Inductor's {megabytes(before)}" if before else "Inductor's default: 0 B"
    return _plain_card(title, megabytes(now), change, more)


def _plain_card(title: str, value: str, *lines: str | None) -> Markup:
    words = [element("p", line) for line in lines if line is not None]
    return element("div", element("h3", title), element("p", value, class_="figure"), *words, class_="card")


def _regions(regions: Sequence[Record]) -> Markup:
    intro = "A row for each tensor, or for all that are alike in layers that repeat. Click on a header to sort."
    if len(regions) == 1:
        return section("Plan against Inductor", "plan", paragraphs(intro), _region(regions[0], "Plan against Inductor"))
    several = f"{intro} The model was compiled in {len(regions)} regions (graphs)."
    blocks = [
        element(
            "details",
            element("summary", f"Region {i}: {r.inactive_because or f'plan {r.plan_hash}'}"),
            _region(r, f"Plan against Inductor, region {i}"),
            open=not i,
        )
        for i, r in enumerate(regions)
    ]
    return section("Plan against Inductor", "plan", paragraphs(several), *blocks)


def _region(region: Record, title: str) -> Markup:
    notes = region.notes if region.inactive_because is None else (f"left alone: {region.inactive_because}", *region.notes)
    alone = [
        (code_cell(parameter), number_cell(f"{count}", count), code_cell(matmul), long_cell(why))
        for (matmul, parameter, why), count in folded_left_alone(region.rejected)
    ]
    header = ("parameter", "how many", "matmul", "why")
    return join(
        [
            tensor_table(region.sites, title),
            element("h3", "Notes") if notes else None,
            _list(notes) if notes else None,
            _footprint(region),
            table("Weight gradients that stay as they are", header, alone) if alone else None,
        ]
    )


def _footprint(region: Record) -> Markup | None:
    plan, default = region.footprint, region.footprint_default
    if plan is None or default is None:
        return None
    names = [f.name for f in fields(Footprint)]
    rows = [
        (_FOOTPRINT[name], bytes_cell(getattr(default, name)), bytes_cell(getattr(plan, name)))
        for name in names
        if getattr(default, name) or getattr(plan, name)
    ]
    return table("Predicted memory of one call, above what was there before", ("", "Inductor", "plan"), rows)


def _subspaces(rows: Sequence[SubspaceRow]) -> Markup:
    cells: list[Sequence[Child]] = []
    for name, members in folded_subspaces(rows):
        first, residual_energies = members[0], [r.tail for r in members if r.tail is not None]
        cells.append(
            (
                code_cell(name if len(members) > 1 else first.parameter),
                number_cell(f"{len(members)}", len(members)),
                first.projection,
                number_cell(f"{first.rank}", first.rank),
                number_cell(f"{first.width}", first.width),
                number_cell(f"{max(residual_energies):.3f}", max(residual_energies)) if residual_energies else "-",
                number_cell(f"{max(r.moves for r in members)}", max(r.moves for r in members)),
                bytes_cell(sum(r.nbytes for r in members)),
            )
        )
    header = ("subspace of", "how many", "projection", "rank", "width", "energy outside, at most", "moved", "bytes")
    text = "Directions that follow the data. What is outside of them is lost, or drawn at random."
    return section("Learned subspaces", "subspaces", paragraphs(text), table("Learned subspaces", header, cells))


def _list(texts: Sequence[str]) -> Markup:
    return element("ul", *(element("li", text) for text in texts), class_="notes")

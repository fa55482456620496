"""What is saved for backward: by form, kind and layer, and tensor by tensor against Inductor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from actpass._format import megabytes
from actpass.ir.joint_graph import fold_indices
from actpass.reporting.html.charts import bar, legend
from actpass.reporting.html.markup import Markup, element
from actpass.reporting.html.tables import bytes_cell, code_cell, long_cell, paragraphs, section, table
from actpass.reporting.record import SiteRow
from actpass.reporting.rows import folded

FORMS: Mapping[str, tuple[str, str]] = {
    "save": ("form-1", "stored as it is"),
    "quantize": ("form-2", "stored in few bits"),
    "project": ("form-3", "its projection onto fewer dimensions is stored"),
    "recompute": ("form-4", "not stored: recomputed in the backward from what is"),
    "chunk": ("form-5", "never formed whole: worked off in chunks of rows"),
    "state": ("form-6", "a basis or the seed that both passes read"),
    "input": ("form-7", "an input of the region, in memory anyway"),
}
"""Form -> its color, and what it means."""
_LAYER = re.compile(r"^(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<index>\d+)(?=\.|$)")


@dataclass
class _Sums:
    """Bytes of some tensors: under Inductor's default, and under the plan by form. count: tensors, or layers alike."""

    before: int = 0
    after: dict[str, int] = field(default_factory=dict[str, int])
    count: int = 0

    def add(self, row: SiteRow) -> None:
        self.before += row.bytes_before
        if row.bytes_after:
            self.after[row.form] = self.after.get(row.form, 0) + row.bytes_after
        self.count += 1

    @property
    def total(self) -> int:
        return sum(self.after.values())


def saved_section(sites: Sequence[SiteRow]) -> Markup:
    forms = [form for form in FORMS if any(s.form == form for s in sites)]
    return section(
        "Saved for backward",
        "saved",
        paragraphs(
            "Tensors that the forward computes and the backward reads. The thin gray bar is what Inductor's default saves; the "
            "bar below it is what this plan saves, colored by the form in which it is stored."
        ),
        legend([("before", "Inductor's default"), *((FORMS[f][0], f"{f}: {FORMS[f][1]}") for f in forms)]),
        element("h3", "By form"),
        _bars((form, _sum(s for s in sites if s.form == form)) for form in forms),
        element("h3", "By kind of tensor"),
        _bars(_largest_first(_grouped(sites, lambda s: s.kind))),
        element("h3", "By layer"),
        _bars(_layers(sites)),
    )


def _sum(sites: Iterable[SiteRow]) -> _Sums:
    sums = _Sums()
    for row in sites:
        sums.add(row)
    return sums


def _grouped(sites: Iterable[SiteRow], key: Callable[[SiteRow], str]) -> dict[str, _Sums]:
    groups: dict[str, _Sums] = {}
    for row in sites:
        groups.setdefault(key(row), _Sums()).add(row)
    return groups


def _largest_first(groups: Mapping[str, _Sums]) -> list[tuple[str, _Sums]]:
    return sorted(groups.items(), key=lambda item: -max(item[1].before, item[1].total))


def _layers(sites: Iterable[SiteRow]) -> list[tuple[str, _Sums]]:
    """Layers in order, those alike that follow each other as one; then what belongs to none."""
    inside: dict[tuple[str, int], _Sums] = {}
    outside: dict[str, _Sums] = {}
    for row in sites:
        found = _LAYER.match(row.module)
        if found is not None:
            inside.setdefault((found["prefix"], int(found["index"])), _Sums()).add(row)
        else:
            outside.setdefault(row.module or "no module", _Sums()).add(row)
    runs: list[tuple[str, int, int, _Sums]] = []
    for (prefix, index), sums in sorted(inside.items()):
        if runs and (runs[-1][0], runs[-1][2] + 1) == (prefix, index) and runs[-1][3] == sums:
            runs[-1] = (prefix, runs[-1][1], index, sums)
        else:
            runs.append((prefix, index, index, sums))
    rows = [(f"{prefix}{_span(a, b)}", _times(sums, b - a + 1)) for prefix, a, b, sums in runs]
    return [*rows, *_largest_first(outside)]


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last} ({last - first + 1} layers alike)"


def _times(sums: _Sums, count: int) -> _Sums:
    return _Sums(sums.before * count, {form: nbytes * count for form, nbytes in sums.after.items()}, sums.count * count)


def _bars(rows: Iterable[tuple[str, _Sums]]) -> Markup:
    shown = [(name, sums) for name, sums in rows if sums.before or sums.total]
    most = max((max(s.before, s.total) for _, s in shown), default=1)
    return element("ul", *(_bar(name, sums, most) for name, sums in shown), class_="bars")


def _bar(name: str, sums: _Sums, most: int) -> Markup:
    forms = ", ".join(f"{megabytes(n)} {form}" for form, n in sums.after.items())
    label = (
        f"{name}: {megabytes(sums.before)} by Inductor's default, {megabytes(sums.total)} now{f' ({forms})' if forms else ''}"
    )
    order = [form for form in FORMS if form in sums.after]
    return element(
        "li",
        element("span", name, class_="name"),
        element("span", f"{megabytes(sums.before)} → {megabytes(sums.total)}", class_="amount", data_after=sums.total),
        bar(sums.before / most, {FORMS[form][0]: sums.after[form] / most for form in order}, label),
    )


def tensor_table(sites: Sequence[SiteRow], title: str) -> Markup:
    """The plan against Inductor: a row for each tensor, or for all that are alike in repeated layers; the largest first."""
    rows = sorted(folded(sites), key=lambda item: -max(item[0].bytes_before, item[0].bytes_after) * item[1])
    header = (
        "tensor", "how many", "module", "shape", "dtype", "form", "weight gradient", "Inductor", "plan", "unbiased", "why",
        "line",
    )  # fmt: skip
    before, after = sum(s.bytes_before for s in sites), sum(s.bytes_after for s in sites)
    total = ("all together", f"{len(sites)}", "", "", "", "", "", bytes_cell(before), bytes_cell(after), "", "", "")
    return table(title, header, (_cells(row, count) for row, count in rows), total)


def _cells(row: SiteRow, count: int) -> tuple[Markup | str, ...]:
    how = row.wgrad or ("exact" if row.projection is None else f"{row.projection} {row.rank}")
    return (
        row.kind,
        element("td", f"{count}", class_="number", data_value=count),
        code_cell(fold_indices(row.module) if count > 1 else row.module),
        code_cell("x".join(map(str, row.shape))),
        row.dtype,
        element("td", element("i", class_=f"key {FORMS[row.form][0]}"), row.stored_as, class_="form"),
        how if row.parameters else "-",
        bytes_cell(row.bytes_before * count),
        bytes_cell(row.bytes_after * count),
        "yes" if row.unbiased else element("strong", "no"),
        long_cell(row.reason),
        code_cell(row.source),
    )

"""Two plans side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from actpass._format import megabytes, table
from actpass.ir.joint_graph import fold_indices
from actpass.plan import Decision, Plan, Storage

_Row = tuple[str, str, str, str, str, int, int]
"""(module, tensor, shape, form before, form after, bytes before, bytes after)."""


def differences(before: Sequence[Plan], after: Sequence[Plan]) -> Iterator[str]:
    """Lines that say how ``after`` differs from ``before``; one line if it does not."""
    if [(r.graph, r.hash) for r in before] == [(r.graph, r.hash) for r in after]:
        yield "the plans are the same"
        return
    others = list(after)
    for number, region in enumerate(before):
        other = next((r for r in others if r.graph == region.graph), None)
        if other is None:
            yield f"region {number}: only in the first plan (graph {region.graph})"
            continue
        others.remove(other)
        lines = list(_region(region, other))
        if lines:
            yield from (f"region {number}:", *lines) if len(before) > 1 else lines
    for region in others:
        yield f"only in the second plan: a region of {_stored(region)} stored bytes (graph {region.graph})"


def _region(one: Plan, other: Plan) -> Iterator[str]:
    rows = [*_forms(one, other), *_projections(one, other)]
    if rows:
        header = ("module", "tensor", "shape", "was", "is", "bytes before", "bytes after")
        yield from table([header, *_folded(rows)])
    for name in ("recompute", "must_save"):
        yield from _names(name, one, other)
    for name in ("recompute_materialized", "chunk_rows", "seeded"):
        was, now = getattr(one, name), getattr(other, name)
        if was != now:
            yield f"{name}: {was} -> {now}"
    if one.hash != other.hash:
        yield from _totals(one, other)


def _forms(one: Plan, other: Plan) -> Iterator[_Row]:
    old, new = ({s.node: s for s in p.storages} for p in (one, other))
    for node in dict.fromkeys((*old, *new)):
        a, b = old.get(node), new.get(node)
        known = a or b
        assert known is not None
        if _form(a) != _form(b):
            shape = "x".join(map(str, known.shape))
            yield known.module, node, f"{shape} {known.dtype}", _form(a), _form(b), _bytes(a), _bytes(b)


def _form(s: Storage | None) -> str:
    """As text; all that distinguishes two low-bit forms."""
    if s is None:
        return "not stored"
    if not s.coded:
        return s.codec
    details = (f"group {s.group_size}" if s.group_size else "", s.rounding, "rotated" if s.hadamard_rotation else "")
    return " ".join((s.codec, *filter(None, details)))


def _bytes(s: Storage | None) -> int:
    return s.stored_bytes if s is not None else 0


def _projections(one: Plan, other: Plan) -> Iterator[_Row]:
    old, new = ({m: d for d in (*p.projections, *p.from_codes) for m in d.matmuls or (d.site,)} for p in (one, other))
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        known = a or b
        assert known is not None
        texts = [_way(d) for d in (a, b)]
        if texts[0] != texts[1]:
            yield ", ".join(known.parameters), name, "weight gradient" if known.matmuls else "decoded", texts[0], texts[1], 0, 0


def _way(d: Decision | None) -> str:
    """How weight gradients are formed, as text."""
    if d is None:
        return "exact"
    if d.wgrad is not None:
        return f"{d.wgrad} ({d.rounding}, cast in {d.project_in})"
    return f"{d.projection} rank {d.rank} ({d.projection_scaling}, in {d.project_in})"


def _folded(rows: Sequence[_Row]) -> Iterator[tuple[str, ...]]:
    """Rows of identical layers in one."""
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault((fold_indices(row[0]), *row[2:5]), []).append(row)
    for (module, shape, was, now), members in groups.items():
        first, count = members[0], len(members)
        tensor = f"{first[1]} (x{count})" if count > 1 else first[1]
        before, after = sum(m[5] for m in members), sum(m[6] for m in members)
        shown = (megabytes(before), megabytes(after)) if before or after else ("-", "-")
        yield (module if count > 1 else first[0]) or "-", tensor, shape, was, now, *shown


def _names(name: str, one: Plan, other: Plan) -> Iterator[str]:
    """What is run again, or held, in one plan only."""
    verb = {"recompute": "recomputed", "must_save": "saved by name"}[name]
    modules = {**dict(one.modules), **dict(other.modules)}
    old, new = getattr(one, name), getattr(other, name)
    for text, names in (("no longer", [n for n in old if n not in new]), ("now", [n for n in new if n not in old])):
        if names:
            yield f"{text} {verb}: {_by_module(names, modules)}"


def _by_module(names: Sequence[str], modules: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for n in names:
        groups.setdefault(fold_indices(modules.get(n, "")), []).append(n)
    return ", ".join(
        f"{m or '-'} ({members[0]}{f', x{len(members)}' if len(members) > 1 else ''})" for m, members in groups.items()
    )


def _totals(one: Plan, other: Plan) -> Iterator[str]:
    yield f"stored: {megabytes(_stored(one))} -> {megabytes(_stored(other))}"
    a, b = one.predicted, other.predicted
    if a is None or b is None:
        return
    if a.peak_bytes is not None and b.peak_bytes is not None:
        yield f"predicted peak of the region: {megabytes(a.peak_bytes)} -> {megabytes(b.peak_bytes)}"
    yield (
        f"recomputed: {a.extra_matmuls} matmuls and {a.extra_attention} attention -> {b.extra_matmuls} and "
        f"{b.extra_attention}; backward matmuls: "
        f"{a.backward_matmul_flops / 1e9:.2f} -> {b.backward_matmul_flops / 1e9:.2f} GFLOP"
    )


def _stored(plan: Plan) -> int:
    return sum(s.stored_bytes for s in plan.storages)

"""Rows of a report: those of identical layers folded to one, and sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actpass.ir.joint_graph import fold_indices
from actpass.reporting.record import SiteRow


def folded(sites: Iterable[SiteRow]) -> list[tuple[SiteRow, int]]:
    """Rows of identical layers folded to one, with how many there are."""
    groups: dict[Any, list[SiteRow]] = {}
    for s in sites:
        key = (
            fold_indices(s.module),
            s.op,
            s.shape,
            s.dtype,
            s.form,
            s.projection,
            s.rank,
            s.codec,
            s.decoded,
            s.wgrad,
            s.bytes_before,
            s.bytes_after,
            s.source,
        )
        groups.setdefault(key, []).append(s)
    return [(rows[0], len(rows)) for rows in groups.values()]


def folded_left_alone(rows: Iterable[tuple[str, str, str]]) -> list[tuple[tuple[str, str, str], int]]:
    groups: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for row in rows:
        groups.setdefault((fold_indices(row[1]), row[2]), []).append(row)
    return [((found[0][0], key[0] if len(found) > 1 else found[0][1], key[1]), len(found)) for key, found in groups.items()]


def times(count: int) -> str:
    return f" (x{count})" if count > 1 else ""


def subtotals(sites: Iterable[SiteRow]) -> list[tuple[str, int, int]]:
    sums: dict[str, list[int]] = {}
    for s in sites:
        entry = sums.setdefault(s.kind, [0, 0])
        entry[0] += s.bytes_before
        entry[1] += s.bytes_after
    return [(kind, b, a) for kind, (b, a) in sorted(sums.items(), key=lambda item: -item[1][0])]

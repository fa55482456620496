"""What the learned subspaces of a run captured: lines of the report, and the picture of the spectra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from actpass._format import megabytes, table
from actpass.ir.joint_graph import fold_indices


@dataclass(frozen=True, slots=True)
class SubspaceRow:
    """A learned subspace as it stands. parameter: that it belongs to, first of those whose gradients go through it. rank: of
    the projection, of which the first ``principal`` directions follow the data. moves: how often it moved. captured: energy
    along its directions, the largest first, as fractions of the whole, as its last sketch has it; empty before the first.
    nbytes: of its state."""

    parameter: str
    projection: str
    width: int
    rank: int
    principal: int
    moves: int
    nbytes: int
    captured: tuple[float, ...] = ()

    @property
    def tail(self) -> float | None:
        """The fraction of the energy beyond the principal directions."""
        return max(0.0, 1.0 - sum(self.captured[: self.principal])) if self.captured else None


def lines(rows: Sequence[SubspaceRow]) -> Iterator[str]:
    """One for all layers that are alike, and their bytes together."""
    if not rows:
        return
    cells = [("subspace of", "projection", "rank", "width", "energy beyond the principal directions", "moved")]
    for name, members in folded(rows):
        tails = [r.tail for r in members if r.tail is not None]
        first = members[0]
        name = name if len(members) > 1 else first.parameter
        beyond = f"{min(tails):.3f} to {max(tails):.3f}" if len(tails) > 1 else f"{tails[0]:.3f}" if tails else "-"
        rank = f"{first.principal}+{first.rank - first.principal}" if first.principal < first.rank else f"{first.rank}"
        times = f" (x{len(members)})" if len(members) > 1 else ""
        cells.append((f"{name}{times}", first.projection, rank, f"{first.width}", beyond, f"{max(r.moves for r in members)}x"))
    yield from table(cells)
    yield f"learned subspaces take {megabytes(sum(r.nbytes for r in rows))}"


def folded(rows: Iterable[SubspaceRow]) -> list[tuple[str, list[SubspaceRow]]]:
    groups: dict[tuple[str, str, int, int], list[SubspaceRow]] = {}
    for row in rows:
        groups.setdefault((fold_indices(row.parameter), row.projection, row.width, row.rank), []).append(row)
    return [(key[0], members) for key, members in groups.items()]

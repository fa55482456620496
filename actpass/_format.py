"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Iterator


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:.1f} kB" if nbytes >= 1_000 else f"{nbytes} B"

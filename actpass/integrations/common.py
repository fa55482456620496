"""What callbacks of all frameworks say."""

from __future__ import annotations

import torch

from actpass._format import megabytes
from actpass.reporting import Report

UNKNOWN = (
    "the checkpoint was saved without ActpassCallback, and holds no state of actpass: bases and rounding begin anew, and the "
    "run is not bitwise the one that was stopped."
)


def figures_of(report: Report) -> dict[str, int]:
    """Bytes, by the name under which they are logged: what the forward saves for the backward, the predicted peak of forward
    and backward above parameters and optimizer state, where it is known, and on a GPU the peak that was allocated so far, all
    counted in. Empty if nothing was compiled."""
    if not report.regions:
        return {}
    found = {"actpass_saved_bytes": report.saved_bytes}
    if (peak := report.totals.peak_bytes) is not None:
        found["actpass_predicted_peak_bytes"] = peak
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["actpass_allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def as_text(figures: dict[str, int]) -> str:
    return ", ".join(f"{name.removeprefix('actpass_').removesuffix('_bytes')} {megabytes(n)}" for name, n in figures.items())

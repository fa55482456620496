"""One tensor in one form: what it takes, and what is possible and safe in place of what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import EXPONENTIAL, SAVE, SavedTensor, Storage
from actpass.plan.request import AUTO, KEPT, TensorRequest

StoredBytes = Callable[[SavedTensor, str, int | None], int | None]
"""(tensor, codec, group size) -> bytes; None if it can't be divided into groups."""


def keep(t: SavedTensor, reason: str) -> Storage:
    """``t`` as it is."""
    return Storage(t.node, t.saved_for_backward, t.base, SAVE, reason, t.nbytes, t.nbytes, **_where(t))


def store(t: SavedTensor, request: TensorRequest, stored_bytes: StoredBytes, codec: str | None, codecs: CodecSet) -> Storage:
    """``t`` in ``codec`` (None: as it is), or what is possible and safe in its place: unless an override names the module, a
    query or key gets no coarser form than is safe (`CodecSet`)."""
    if t.obstacle is not None:
        return keep(t, t.obstacle)
    if EXPONENTIAL in t.kinds and request.format is not None and not request.forced:
        return keep(t, "exponentiated in the backward, where its error becomes a factor; an override may ask for a form")
    if codec in (None, SAVE):
        return keep(t, "exact, and within the budget" if request.format == AUTO else KEPT)
    if not request.forced:
        codec = codecs.made_safe(codec, t.kinds)
    rounding = request.rounding if request.rounding != AUTO else "stochastic" if t.linear else "nearest"
    size = stored_bytes(t, codec, request.group_size)
    if size is None:
        return keep(t, "can't be divided into groups at symbolic sizes")
    if size >= t.nbytes:
        return keep(t, f"would take {size} bytes in {codec}")
    return Storage(
        t.node,
        t.saved_for_backward,
        t.base,
        codec,
        f"uses: {', '.join(t.kinds)}",
        t.nbytes,
        size,
        unbiased=t.linear and rounding == "stochastic",
        group_size=request.group_size,
        rounding=rounding,
        hadamard_rotation=request.hadamard_rotation,
        forced=request.forced,
        **_where(t),
    )


def _where(t: SavedTensor) -> dict[str, Any]:
    return {"module": t.paths[0] if t.paths else "", "shape": t.shape, "dtype": t.dtype}

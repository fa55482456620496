"""One tensor in one form: what it takes, and what is possible and safe in place of what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import EXPONENTIAL, KEEP, SavedTensor, Storage
from actpass.plan.policy import AUTO, KEPT, Wish

StoredBytes = Callable[[SavedTensor, str, int | None], int | None]
"""(tensor, codec, group size) -> bytes; None if it can't be divided into groups."""


def keep(t: SavedTensor, reason: str) -> Storage:
    """``t`` as it is."""
    return Storage(t.node, t.crossing, t.root, KEEP, reason, t.nbytes, t.nbytes, **_where(t))


def store(t: SavedTensor, wish: Wish, stored_bytes: StoredBytes, codec: str | None, codecs: CodecSet) -> Storage:
    """``t`` in ``codec`` (None: as it is), or what is possible and safe in its place: unless an override names the module, a
    query or key gets no coarser form than is safe (`CodecSet`)."""
    if t.obstacle is not None:
        return keep(t, t.obstacle)
    if EXPONENTIAL in t.kinds and wish.codec is not None and not wish.named:
        return keep(t, "exponentiated in the backward, where its error becomes a factor; an override may ask for a form")
    if codec in (None, KEEP):
        return keep(t, "exact, and within the budget" if wish.codec == AUTO else KEPT)
    if not wish.named:
        codec = codecs.made_safe(codec, t.kinds)
    rounding = wish.rounding if wish.rounding != AUTO else "stochastic" if t.linear else "nearest"
    size = stored_bytes(t, codec, wish.group)
    if size is None:
        return keep(t, "can't be divided into groups at symbolic sizes")
    if size >= t.nbytes:
        return keep(t, f"would take {size} bytes in {codec}")
    return Storage(
        t.node,
        t.crossing,
        t.root,
        codec,
        f"uses: {', '.join(t.kinds)}",
        t.nbytes,
        size,
        unbiased=t.linear and rounding == "stochastic",
        group=wish.group,
        rounding=rounding,
        rotate=wish.rotate,
        named=wish.named,
        **_where(t),
    )


def _where(t: SavedTensor) -> dict[str, Any]:
    return {"module": t.paths[0] if t.paths else "", "shape": t.shape, "dtype": t.dtype}

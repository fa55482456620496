"""How a tensor is laid out for a group-wise low-bit code: which elements share a scale, which share a byte.

Shapes: a tensor is first seen in the order of its memory, as (..., D). G elements that lie next to each other along D share
one scale. For codes below a byte, K elements share one: not neighbours, but elements that lie K-th parts of one axis (`axis`)
apart, so that packing and unpacking read and write whole contiguous rows and a compiler can vectorise them. Scales have the
shape (K, ..., D/G) of the packed tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actpass.torch_compat import unflatten

_NARROW = 512
"""Trailing axes are merged until a row has this many elements, and where sizes are known all others, too: tensors of one size
then share one code, however they are seen (a query as (B, S, H, D), the residual stream as (B S, H D))."""


@dataclass(frozen=True, slots=True)
class Groups:
    """shape: the tensor as it is coded, (rows, D), or (..., D) where sizes are symbolic. group: G, divides D. axis, pieces:
    `axis` of ``shape`` is split in ``pieces`` (K) parts whose elements share a byte. padding: zeros behind the last element."""

    shape: tuple[Any, ...]
    group: int
    axis: int
    pieces: int
    padding: int

    @classmethod
    def of(cls, shape: Sequence[Any], group: int, pieces: int) -> Groups | None:
        """The layout for a tensor whose memory has ``shape``, with groups of nearly ``group``. None where sizes are symbolic
        and no axis can be divided without knowing them."""
        *leading, columns = shape or (1,)
        known = all(isinstance(s, int) for s in (*leading, columns))
        if isinstance(columns, int):
            while leading and isinstance(leading[-1], int) and (columns < _NARROW or _near_divisor(columns, group) is None):
                columns *= leading.pop()
            merged = (math.prod(leading), columns) if known else (*leading, columns)
            size = _near_divisor(columns, group)
            if size is not None:
                units = (*merged[:-1], columns // size)  # groups stay whole
                for axis, length in enumerate(units):
                    if isinstance(length, int) and length % pieces == 0:
                        return cls(merged, size, axis, pieces, 0)
        if not known:
            return None
        count = math.prod(shape)
        rows = -(-count // (group * pieces)) * pieces
        return cls((rows, group), group, 0, pieces, rows * group - count)

    @property
    def packed_shape(self) -> tuple[Any, ...]:
        return tuple(s // self.pieces if i == self.axis else s for i, s in enumerate(self.shape))

    @property
    def scales_shape(self) -> tuple[Any, ...]:
        """(K, ..., D/G) of `packed_shape`: the groups of the first element in each byte, of the second, and so on."""
        *rows, columns = self.packed_shape
        return (self.pieces, *rows, columns // self.group)

    @property
    def rows(self) -> Any:
        return math.prod(self.packed_shape[:-1])

    @property
    def columns(self) -> Any:
        return self.packed_shape[-1]

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (any shape, in the order of its memory) as ``self.shape``."""
        if self.padding:
            x = torch.nn.functional.pad(x.reshape(-1), (0, self.padding))
        return x.reshape(self.shape)

    def restore(self, x: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
        """The inverse of `view`."""
        if self.padding:
            x = x.reshape(-1)[: math.prod(shape)]
        return x.reshape(tuple(shape))

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D/G, G)."""
        return unflatten(x, -1, (x.shape[-1] // self.group, self.group))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Grouped -> (K, ...): the elements of each byte along a new first axis.

        Rows are seen in four parts where they can be: on a GPU Inductor compares loops that are nested equally deep by their
        ranges alone, and would not fuse one over (tokens, features) with one over (tokens, groups, group) for tensors of three
        axes, if rows are padded (torch 2.13 to 2.15). Few operators of a model are nested so deep."""
        x = unflatten(x, self.axis, (self.pieces, x.shape[self.axis] // self.pieces)).movedim(self.axis, 0)
        rows: Any = x.shape[1]
        return unflatten(x, 1, (2, 2, rows // 4)) if isinstance(rows, int) and rows % 4 == 0 else x

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """(K, *packed_shape) -> (..., D)."""
        return x.movedim(0, self.axis).flatten(self.axis, self.axis + 1)


def _near_divisor(width: int, group: int) -> int | None:
    """The divisor of ``width`` nearest to ``group`` by ratio, within a factor of two; multiples of 16, a vector register or a
    warp's half, come first. None if there is none."""
    found = [d for d in range(-(-group // 2), 2 * group + 1) if width % d == 0]
    return min(found, key=lambda d: (d % 16 != 0, abs(math.log(d / group)), d), default=None)

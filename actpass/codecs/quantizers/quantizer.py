"""Low-bit forms: what all of them share.

A tensor is stored as codes of a few bits and one bfloat16 scale for each group of G elements. Sources: group-wise
stochastic rounding of saved activations is Chen et al., "ActNN: Reducing training memory footprint via 2-bit activation
compressed training", ICML 2021, arXiv 2104.14129, and Liu et al., "GACT", ICML 2022, arXiv 2206.11357; here with a scale but no
offset, from a counter-based generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from actpass.codecs.generator import ROUNDING_BITS, uniforms
from actpass.codecs.hadamard import orthogonal
from actpass.codecs.quantizers.groups import Groups
from actpass.errors import PluginError

_MARGIN = 1.01
"""The scale is rounded down to bfloat16, by up to 2^-7: with it every value lies strictly inside the range of the codes."""
_SMALLEST_SCALE = 2.0**-120
"""Groups whose largest magnitude is below about 1e-36 keep this scale, which has a finite inverse."""


Noise = tuple[torch.Tensor, ...]
PAYLOAD_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2)
"""What `Quantizer.pack` may return."""


class Quantizer(ABC):
    """``bits`` a code and 16 / G bits of scale an element: N (bits / 8 + 2 / G) bytes for N elements.

    Stochastic rounding: E[x_hat] = x, any two elements independently. ``nearest``: at most half a step off, biased. A NaN or an
    infinity makes its whole group NaN or infinite, never a number. About 25 pointwise operations an element to encode, 5 to
    decode; ``hadamard_rotation`` adds a product with a (G, G) matrix to each.

    name: what ``options={"codec": ...}`` takes. bits: of one code; codes below a byte are packed. group: the group size G
    that is used where none is asked for.
    """

    bits: int
    group: int

    @property
    def in_budgets(self) -> bool:
        """Whether a memory budget may choose it by itself, and a calibration measures it."""
        return False

    @property
    def safe_for_scores(self) -> bool:
        """Whether queries and keys of fused attention may take it beside the statistic of the exact ones. The backward
        exponentiates their product: an error becomes a factor. The criterion: no element is off by more than 2^-15 of the
        largest magnitude of its group, so that scores of 200 are off by a hundredth; by 8 bits they are by one or two."""
        return False

    @property
    def safe_for_recomputed_scores(self) -> bool:
        """As `safe_for_scores`, where attention is recomputed from what was stored and its rows sum to one again. Of the values
        and outputs of fused attention it says what a policy chooses by itself; a codec that the user names they take in any
        case, for their error becomes no factor. The criterion: no element is off by more than 2^-7 of the largest magnitude
        of its group, and `error` is 1e-4 or less (8 evenly spaced bits: 2^-8 and 4.4e-5; not float8, 8e-4)."""
        return False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def error(self) -> float:
        """Squared relative error of a Gaussian tensor, rounded to nearest, by which a budget weighs the form (tests measure it
        to a factor of two)."""

    @property
    def pieces(self) -> int:
        """K, codes in a byte: 8 / bits, at least 1."""
        return max(1, 8 // self.bits)

    @property
    def random_bits(self) -> int:
        """Of a uniform number: as many as are exact beside a code in float32, where more would round up to the next."""
        return min(24 - self.bits, self.noise_bits)

    @property
    def noise_bits(self) -> int:
        """Of a number of `rounding_noise`, that are mixed for one element."""
        return min(16, ROUNDING_BITS // self.pieces)

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest magnitude, in steps of the scale, that a code expresses. The scale has a margin: of what is encoded no
        magnitude is above `largest` / 1.002, so that the codes beyond are the room that stochastic rounding takes."""

    @abstractmethod
    def round(self, steps: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        """Values in (-largest, largest), float32 (..., groups, G) -> codes, of that shape and any dtype: of one of the K that
        share a byte. uniform: for stochastic rounding, float32 of that shape: (i + 1/2) / 2^`random_bits`, never 0 or 1, so
        that ``floor(x + uniform)`` has no bias; None: to nearest."""

    @abstractmethod
    def pack(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """K tensors of codes, as `round` returns them -> the payload: one tensor of their shape, K codes an element, of one of
        `PAYLOAD_DTYPES` that has K times `bits` bits."""

    @abstractmethod
    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        """Payload (...), as `pack` returned it -> values in steps of the scale, float32 of its shape with K leading: the k-th
        are those of the k-th tensor that was packed. For K = 1, too: (1, ...)."""

    def neighbours(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values in (-largest, largest) -> the two values of codes around each, below <= value < above, of their shape and
        dtype. Stochastic rounding chooses between them. For tests and not for graphs. By default it is found by rounding values
        near by; a codec that knows it in closed form says so, which is exact and fast."""
        end = self.largest * (1 - 2.0**-20)
        below, above = torch.full_like(steps, -math.inf), torch.full_like(steps, math.inf)
        for away in (0.0, *(sign * self.largest * 2.0**-k for k in range(1, 23) for sign in (1, -1))):
            near = (steps + away).clamp(-end, end).to(torch.float32)
            for draw in (2.0**-20, 1 - 2.0**-20):
                codes = self.round(near, torch.full_like(near, draw))
                found = self.unpack(self.pack([codes] * self.pieces))[0].to(steps.dtype)
                below = torch.where(found <= steps, torch.maximum(below, found), below)
                above = torch.where(found > steps, torch.minimum(above, found), above)
        return below, above

    def encode(
        self, x: torch.Tensor, groups: Groups, noise: Noise | None, *, rotate: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (*groups.packed_shape), scales (*groups.scales_shape) in bfloat16).

        x: any shape, in the order of its memory. noise: `groups.rows` and `groups.columns` numbers of `rounding_noise` for
        stochastic rounding, None for nearest. rotate: multiply each group by a fixed orthogonal (Hadamard) matrix first, which
        spreads outliers.

        The order of operations is for the compiler. The K elements of a byte have scales of their own, each found over the same
        loop as the byte is formed, so that all is one kernel, and so with the kernel that makes ``x``. No instruction converts
        between integers and floating point, which a GPU does at an eighth of its rate. Few operations stand between the loads
        and the payload, because Inductor writes a full-size intermediate where an expression grows too long (50 operations on
        a CPU, 30 on a GPU, torch 2.13) and its users can't be fused with it.
        """
        values = groups.grouped(groups.view(x).to(torch.float32))
        if rotate:
            values = torch.matmul(values, _rotation(groups, x.device))
        codes: list[torch.Tensor] = []
        scales: list[torch.Tensor] = []
        for k, piece in enumerate(groups.split(values).unbind()):
            largest = piece.abs().amax(-1, keepdim=True)
            scales.append(_bfloat16(largest * (_MARGIN / self.largest)))
            uniform = None if noise is None else uniforms(noise, piece.shape, self.random_bits, k, self.noise_bits)
            codes.append(self.round(piece * (1.0 / scales[k]), uniform))
        payload = self._checked(self.pack(codes)).reshape(groups.packed_shape)
        return payload, torch.stack([s.to(torch.bfloat16) for s in scales]).reshape(groups.scales_shape)

    def _checked(self, payload: torch.Tensor) -> torch.Tensor:
        bits = self.bits * self.pieces
        if payload.dtype not in PAYLOAD_DTYPES or 8 * payload.element_size() != bits:
            known = ", ".join(str(d).removeprefix("torch.") for d in PAYLOAD_DTYPES)
            raise PluginError(
                f"the codec {self.name!r} packs {self.pieces} codes of {self.bits} bits into {payload.dtype}. Allowed: one of "
                f"{known} that has {bits} bits."
            )
        return payload

    def decode(
        self,
        payload: torch.Tensor,
        scale: torch.Tensor,
        groups: Groups,
        shape: Sequence[Any],
        dtype: torch.dtype,
        *,
        rotate: bool = False,
    ) -> torch.Tensor:
        """x_hat of ``shape`` and ``dtype``."""
        values = groups.grouped(self.unpack(payload)) * scale.to(torch.float32).unsqueeze(-1)
        values = groups.join(values.flatten(-2))
        if rotate:
            values = torch.matmul(groups.grouped(values), _rotation(groups, values.device).t()).flatten(-2)
        if dtype == torch.float16:  # a code may lie 1 % beyond the largest value, and float16 ends at 65504
            values = torch.where(values.isfinite(), values.clamp(-65504.0, 65504.0), values)
        return groups.restore(values, shape).to(dtype)

    def payload_bytes(self, count: int, group: int) -> int:
        """Bytes of the codes and scales of ``count`` elements (padding included) in groups of ``group``."""
        return count * self.bits // 8 + 2 * (count // group)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded towards zero to bfloat16, as float32; at least `_SMALLEST_SCALE`. By its bits: compilers drop a cast there
    and back."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).clamp_min(_SMALLEST_SCALE)


def _rotation(groups: Groups, device: torch.device) -> torch.Tensor:
    return orthogonal(groups.group, device) * groups.group**-0.5

"""8-bit floating point codes: e4m3 (more digits) and e5m2 (more range).

Source of the formats: Micikevicius et al., "FP8 formats for deep learning", 2022, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actpass.codecs.quantizers.quantizer import Quantizer
from actpass.codecs.registry import register_codec

_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class Float8(Quantizer):
    """label: its name. ``dtype``: `torch.float8_e4m3fn` or `torch.float8_e5m2`. Each group is scaled so that its largest
    magnitude is the format's. Stochastic rounding to a neighbour in the format, subnormal numbers included: variance ulp^2
    f (1 - f).
    """

    label: str
    dtype: torch.dtype
    group: int
    bits: int = 8

    @property
    def name(self) -> str:
        return self.label

    @property
    def error(self) -> float:
        return {torch.float8_e4m3fn: 8e-4, torch.float8_e5m2: 3e-3}[self.dtype]

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    def round(self, steps: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        if uniform is None:
            return steps.to(self.dtype)
        info = torch.finfo(self.dtype)  # eps: one unit in the last place of 1.0; smallest_normal: where subnormals begin
        power = (steps.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)  # the power of two below |steps|
        ulp = power.clamp_min(info.smallest_normal) * info.eps
        return (torch.floor(steps / ulp + uniform) * ulp).to(self.dtype)

    def neighbours(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        info = torch.finfo(self.dtype)
        ulp = torch.exp2(torch.floor(torch.log2(steps.abs().clamp_min(info.smallest_normal)))) * info.eps
        below = torch.floor(steps / ulp) * ulp
        return below, below + ulp

    def pack(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        return codes[0]

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        return payload.to(torch.float32).unsqueeze(0)


E4M3 = register_codec(Float8("float8_e4m3", torch.float8_e4m3fn, 64))
register_codec(Float8("float8_e5m2", torch.float8_e5m2, 64))

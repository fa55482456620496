"""An 8-bit logarithmic codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actpass.codecs import Quantizer, register_codec

_PER_OCTAVE = 12
_LEVELS = 127


@register_codec
class Log8(Quantizer):
    """Zero, and 127 magnitudes of either sign, each 2^(1/12) times the one below: down to 1/1450 of the group's largest.

    Stochastic rounding between the two neighbours, unbiased: relative variance at most (2^(1/12) - 1)^2 / 4.
    """

    name = "log8"
    bits = 8
    group = 64
    error = 2.8e-4  # (ln 2 / 12)^2 / 12
    in_budgets = True
    largest = 1.0

    def round(self, steps: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        below = torch.floor(_LEVELS + _PER_OCTAVE * torch.log2(steps.abs())).clamp(0, _LEVELS - 1)
        low, high = _magnitude(below), _magnitude(below + 1)
        share = (steps.abs() - low) / (high - low)
        return torch.sign(steps) * (below + torch.floor(share + (0.5 if uniform is None else uniform)))

    def pack(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        return (codes[0] + 128).to(torch.uint8)

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        codes = payload.to(torch.float32).unsqueeze(0) - 128
        return torch.sign(codes) * _magnitude(codes.abs())


def _magnitude(level: torch.Tensor) -> torch.Tensor:
    return torch.where(level > 0, torch.exp2((level - _LEVELS) / _PER_OCTAVE), 0.0)

"""Weight gradients from codes of 8 bits: dW = dy^T x is one matmul of float8_e4m3 codes, and neither factor is decoded.

A tensor of the contraction is seen as (R, T): R features, T tokens. Its codes lie in that order, tokens contiguous, as the
matmuls of Hopper and newer take both factors. scale: fp32, of each feature (R,), or of the tensor (); codes times scale are
values. Both factors are rounded stochastically and independently of each other, so that E[dW] is exact.

Source of the format: Micikevicius et al., "FP8 formats for deep learning", 2022, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actpass.codecs.generator import rounding_noise, rounding_part, uniforms
from actpass.codecs.quantizers.float8 import E4M3

MULTIPLE = 16
"""Tokens and features that a matmul in fp8 takes: their bytes are read 16 at once."""
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
_MARGIN = 1.002
_SMALLEST_SCALE = 2.0**-120


def scaled_by_row(dtype: torch.dtype) -> bool:
    """Whether a product of ``dtype`` has a scale for each row and column. All kernels that torch may choose take those with
    bfloat16 results, some with others (torch 2.13 to 2.15); a scale for each tensor goes with float32."""
    return dtype == torch.bfloat16


def codes_bytes(features: int, tokens: int, *, by_row: bool) -> int:
    """Of the codes of a tensor and its scales."""
    return features * tokens + 4 * (features if by_row else 1)


def noise(seed: torch.Tensor, features: int, tokens: int, draw: int) -> tuple[torch.Tensor, ...]:
    """The random numbers that one tensor is rounded with. seed: what a region is given. draw: another for each tensor, in
    [0, 2^40)."""
    return rounding_noise(rounding_part(seed), [features, tokens], draw)


def scale_of(x: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """fp32, (R,) or (), of ``x`` (R, T): its largest magnitude, and a little more, is the largest code."""
    values = x.to(torch.float32).abs()
    largest = values.amax(-1) if by_row else values.amax()
    return (largest * (_MARGIN / E4M3.largest)).clamp_min(_SMALLEST_SCALE)


def cast(x: torch.Tensor, scale: torch.Tensor, drawn: Sequence[torch.Tensor]) -> torch.Tensor:
    """The codes of ``x`` (R, T), contiguous (R, 1, T). drawn: `noise` for stochastic rounding; none: to nearest.

    Stochastic: codes times scale are ``x`` in expectation, any two elements of a row or a column independently; variance
    ulp^2 f (1 - f). A NaN or an infinity makes all that has its scale NaN, never a number.

    Of three axes, so that a matmul reads a view of them: what it reads as it was made Inductor lays out in any order, and on a
    GPU this one takes factors with tokens contiguous alone."""
    steps, uniform = x.to(torch.float32).unsqueeze(1) * (1.0 / scale).reshape(-1, 1, 1), None
    if drawn:
        uniform = uniforms(drawn, steps.shape, E4M3.random_bits, 0, E4M3.noise_bits)
    return E4M3.round(steps, uniform).contiguous()


def multiply(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a b^T of codes (P, 1, T) and (Q, 1, T) -> (P, Q) in ``dtype``: one matmul of the device's own in fp8. A CPU has none, and
    forms the same sums of the same codes more slowly than an exact product."""
    if not scaled_by_row(dtype):
        made = torch.ops.aten._scaled_mm.default(a.squeeze(1), b.squeeze(1).t(), scale_a, scale_b, None, None, torch.float32)
        return made.to(dtype)
    rows, columns = len(scale_a), len(scale_b)  # strides as the matmul checks them: those of a view Inductor leaves at 0
    scales = scale_a.as_strided((rows, 1), (1, 1)), scale_b.as_strided((1, columns), (columns, 1))
    return torch.ops.aten._scaled_mm.default(a.squeeze(1), b.squeeze(1).t(), *scales, None, None, dtype)

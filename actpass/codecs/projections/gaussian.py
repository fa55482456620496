"""Gaussian random projection, as in CompAct.

Source: Shamshoum, Hodos, Sieradzki, Schuster, "CompAct: Compressed Activations for Memory-Efficient LLM Training",
NAACL 2025, arXiv 2410.15352, section 3 (P ~ N(0, 1/r) from a per-layer seed).
This project's own: one basis for all tensors of a width and step (the released code draws one for each of q, k and v and
so stores three copies of one projection), and an Irwin-Hall normal that is bit-identical on every back end.
"""

from __future__ import annotations

import torch

from actpass.codecs.generator import normals, stream
from actpass.codecs.projections.projection import SeededProjection
from actpass.codecs.registry import register_projection


@register_projection
class Gaussian(SeededProjection):
    """P_ij ~ N(0, 1/R) independent. Bias 0. Relative variance (N + 1) / R."""

    name = "gaussian"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        return normals(key, stream(width, 0), width * rank).view(width, rank) * rank**-0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return (width + 1) / rank

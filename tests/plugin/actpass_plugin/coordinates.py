"""A projection onto coordinates."""

from __future__ import annotations

import torch

from actpass.codecs import SeededProjection, register_projection
from actpass.codecs.generator import permutation, stream


@register_projection
class RandomSubsetOfCoordinates(SeededProjection):
    """R of the N features, drawn without replacement, times sqrt(N / R). Bias 0. Relative variance N / R - 1.

    Its name is longer than 16 letters.
    """

    name = "random_subset_of_coordinates"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        chosen_1R = permutation(key, stream(width, 60), width)[:rank].unsqueeze(0)
        row_N1 = torch.arange(width, dtype=torch.int64, device=key.device).unsqueeze(1)
        return (row_N1 == chosen_1R).to(torch.float32) * (width / rank) ** 0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return width / rank - 1.0

"""Lion: X. Chen et al., "Symbolic discovery of optimization algorithms", 2023, arXiv 2302.06675, algorithm 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actpass.optim import ComposedOptimizer, register_optimizer
from actpass.optim.transforms import Place, ResetMoments, State


@dataclass(frozen=True)
class SignOfMomentum:
    """sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.99)}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        beta1, beta2 = at.group["betas"]
        m = state.setdefault("exp_avg", torch.zeros_like(gradient))
        update = torch.lerp(m, gradient, 1 - beta1).sign()
        m.lerp_(gradient, 1 - beta2)
        return update


@register_optimizer("lion")
class Lion(ComposedOptimizer):
    """The momentum begins anew with each basis."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, (ResetMoments(), SignOfMomentum()), lr=lr, weight_decay=weight_decay, betas=betas)

    def state_bytes(self, group: Mapping[str, Any], parameter: torch.Tensor) -> int:
        return parameter.numel() * parameter.element_size() + 4

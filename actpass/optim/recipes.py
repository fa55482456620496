"""The optimizers of the published methods, as chains of transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actpass.optim.optimizer import ComposedOptimizer
from actpass.optim.transforms import Adam, CarryMoments, KeepMoments, ResetMoments, Scale


class AdamW(ComposedOptimizer):
    """Adam with decoupled weight decay (I. Loshchilov, F. Hutter, 2019, arXiv 1711.05101), by coefficients where a gradient is
    in factors. Equals `torch.optim.AdamW` on dense gradients."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, (KeepMoments(), Adam()), lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)


class CompActAdamW(ComposedOptimizer):
    """Y. Shamshoum et al., "CompAct", NAACL 2025, arXiv 2410.15352, algorithm 3: Adam on the coefficients, W -= lr alpha P N.

    For ``options={"method": "gaussian", "gradients": "low_rank", "refresh_interval": 50}`` (the paper's P ~ N(0, 1/r), redrawn
    every 50 steps, 200 at 1B); moments are kept when P changes. alpha: the paper's 0.25 for pre-training, 2 to 4 for
    fine-tuning.
    Dense gradients get AdamW's update, without alpha.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 0.25,
    ) -> None:
        chain = (KeepMoments(), Adam(), Scale(alpha))
        super().__init__(params, chain, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, alpha=alpha)


class OasisAdamW(ComposedOptimizer):
    """S. Choudhary, S. Saxena, D. Roy, "OASIS", 2026, arXiv 2604.09406: Adam in a subspace that moves, moments carried along.

    For ``options={"method": "oasis", "gradients": "low_rank"}``; works with seeded bases as well. m goes through the overlap of
    old and new basis, v by LDAdam's rule (`CarryMoments`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, (CarryMoments(), Adam()), lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)


class LazySubspaceAdamW(ComposedOptimizer):
    """Li et al., "Optimal low-rank stochastic gradient estimation", 2026, arXiv 2603.20632: K steps on B in W + B V^T, lift,
    redraw V.

    For ``options={"method": "haar", "gradients": "low_rank", "refresh_interval": K}``. A step on B with V fixed moves W by the
    same step lifted, so W is moved at once, and the lift is nothing; B's optimizer begins anew with each V.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, (ResetMoments(), Adam()), lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

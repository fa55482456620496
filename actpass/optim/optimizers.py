"""The optimizers of the published methods, as chains of transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from actpass.optim.chain import ComposedOptimizer
from actpass.optim.registry import register_optimizer
from actpass.optim.transforms import (
    Adam,
    CarryMoments,
    ErrorFeedback,
    KeepMoments,
    PartialMomentum,
    ResetMoments,
    Scale,
    Transform,
)


class _AdamWith(ComposedOptimizer):
    """Adam behind ``moments``, which says what a change of basis does to its moments."""

    moments: ClassVar[Transform]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        chain = (self.moments, Adam())
        super().__init__(params, chain, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, **options)


@register_optimizer("adamw")
class AdamW(_AdamWith):
    """Adam with decoupled weight decay (I. Loshchilov, F. Hutter, 2019, arXiv 1711.05101), by coefficients where a gradient is
    in factors. Equals `torch.optim.AdamW` on dense gradients."""

    moments = KeepMoments()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


@register_optimizer("compact")
class CompActAdamW(ComposedOptimizer):
    """Y. Shamshoum et al., "CompAct", NAACL 2025, arXiv 2410.15352, algorithm 3: Adam on the coefficients, W -= lr alpha P N.

    For ``options={"projection": "gaussian", "weight_gradient_format": "low_rank", "refresh_interval": 50}`` (the paper's P ~
    N(0, 1/r), redrawn every 50 steps, 200 at 1B); moments are kept when P changes. alpha: the paper's 0.25 for pre-training, 2
    to 4 for fine-tuning. Dense gradients get AdamW's update, without alpha.
    """

    for_low_rank = True

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


@register_optimizer("oasis")
class OasisAdamW(_AdamWith):
    """S. Choudhary, S. Saxena, D. Roy, "OASIS", 2026, arXiv 2604.09406: Adam in a subspace that moves, moments carried along.

    For ``options={"projection": "oasis", "weight_gradient_format": "low_rank"}``; works with seeded bases as well. m goes
    through the overlap of old and new basis, v by LDAdam's rule (`CarryMoments`). ``error_feedback=True`` keeps what m loses on
    the way, at the price of one tensor of the parameter's size (`ErrorFeedback`).
    """

    for_low_rank = True
    moments = ErrorFeedback(CarryMoments())

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        error_feedback: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, error_feedback=error_feedback)


@register_optimizer("lazy")
class LazySubspaceAdamW(_AdamWith):
    """Li et al., "Optimal low-rank stochastic gradient estimation", 2026, arXiv 2603.20632: K steps on B in W + B V^T, lift,
    redraw V.

    For ``options={"projection": "sampled", "weight_gradient_format": "low_rank", "refresh_interval": K}``: V by the paper's law
    for a known covariance, here that of the layer's input. Its other law, for none (``"haar"``), learns less in as many steps
    (docs/benchmarks/loss.md). A step on B with V fixed moves W by the same step lifted, so W is moved at once, and the lift is
    nothing; B's optimizer begins anew with each V.
    """

    for_low_rank = True
    moments = ResetMoments()


@register_optimizer("adapm")
class AdaPM(ComposedOptimizer):
    """Y. Zhang, Y. Liu, C. Fang, "AdaPM", 2025, arXiv 2510.09103: partial momentum, by kind of block (`PartialMomentum`).

    None for embeddings and attention's output, whole for values (and vectors), low-rank with a bias correction for queries,
    keys, and the matrices of the MLP. ``AdaPM(model.named_parameters())`` reads the kinds off the names; a group's own
    ``momentum`` ("none", "low_rank", "full") goes before. momentum_rank: directions, or a fraction of a matrix's smaller side.
    second_moment: "full" (Adam's), or "row" (one number a row). For dense gradients and for those in factors, where a change
    of basis carries the moments over (`CarryMoments`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: str = "auto",
        momentum_rank: float = 1 / 32,
        second_moment: str = "full",
    ) -> None:
        chain = (CarryMoments(), PartialMomentum())
        super().__init__(
            params, chain, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, momentum=momentum,
            momentum_rank=momentum_rank, second_moment=second_moment,
        )  # fmt: skip

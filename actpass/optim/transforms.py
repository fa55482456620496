"""Pieces of optimizers: functions from a gradient to an update, with state of plain tensors.

A transform sees what it is given as numbers: the coefficients (..., M, R) of a gradient in factors, or a dense gradient of any
shape. It keeps what it needs in the parameter's state under names of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actpass.gradients import Basis

State = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a gradient lies. basis: what it is in factors of, None: it is dense. left: see `LowRankGradient`. before: the basis
    of the step before, if it was another. step: of this parameter, the first is 1. group: the parameter group's options."""

    step: int
    group: dict[str, Any]
    basis: Basis | None = None
    left: bool = False
    before: Basis | None = None

    def overlap(self) -> torch.Tensor:
        """O (R_old, R): the coefficients in this basis of what has unit coefficients in the one before, both with columns of
        length one: exact for what lies in both."""
        assert self.basis is not None
        assert self.before is not None
        tiny = torch.finfo(torch.float32).tiny
        old, new = (p / p.norm(dim=0).clamp_min(tiny) for p in (self.before.matrix(), self.basis.matrix()))
        return old.t() @ new

    def carry(self, moment: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
        """``moment``, which has the shape of coefficients in the old basis, through ``overlap``."""
        overlap = overlap.to(moment.dtype)
        return overlap.t() @ moment if self.left else moment @ overlap


class Transform(Protocol):
    """Turns a gradient into an update. defaults: options that a parameter group may set, with their defaults."""

    @property
    def defaults(self) -> dict[str, Any]: ...
    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor: ...


@dataclass(frozen=True)
class Adam:
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, m^ / (sqrt(v^) + eps), hats corrected for bias (D. Kingma, J. Ba, 2015,
    arXiv 1412.6980). State: two tensors of the gradient's shape, of the coefficients' for one in factors. Transforms in
    front of it may have carried them to another basis."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.999), "eps": 1e-8}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(gradient) for _ in range(2))
        beta1, beta2 = at.group["betas"]
        moments = at.step - int(state.get("began", 0))  # since they were last reset
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = 1 / (1 - beta1**moments)
        return m.mul(size).div_(v.sqrt().div_((1 - beta2**moments) ** 0.5).add_(at.group["eps"]))


@dataclass(frozen=True)
class KeepMoments:
    """Moments stay as they are when the basis changes (CompAct, arXiv 2410.15352, section 3: "we keep the moments"); of another
    rank, the first coefficients, and zeros for new ones."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        for name in ("exp_avg", "exp_avg_sq"):
            old = state.get(name)
            if old is not None and old.shape != gradient.shape:
                kept = torch.zeros_like(gradient)
                common = tuple(slice(min(a, b)) for a, b in zip(old.shape, kept.shape, strict=True))
                kept[common] = old[common]
                state[name] = kept
        return gradient


@dataclass(frozen=True)
class CarryMoments:
    """Moments go to a new basis through the overlap O of old and new: m exactly, as far as it lies in both; v by LDAdam's rule
    (arXiv 2410.16103), v' = (1 - b2^(t-1)) |(O * O)(v^ - m^2) + (O m^)^2| with m^ and v^ corrected for bias: v as variance plus
    squared mean, coefficients taken for uncorrelated. OASIS (arXiv 2604.09406) says of v only that it is approximated per
    coordinate; this rule is this project's choice."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        if at.before is None or "exp_avg" not in state:
            return gradient
        beta1, beta2 = at.group["betas"]
        overlap, done = at.overlap(), at.step - 1 - int(state.get("began", 0))
        corrected1, corrected2 = 1 - beta1**done, 1 - beta2**done
        m, v = state["exp_avg"] / corrected1, state["exp_avg_sq"] / corrected2
        mean = at.carry(m, overlap)
        spread = at.carry(v - m.square(), overlap.square())
        state["exp_avg"] = mean * corrected1
        state["exp_avg_sq"] = (spread + mean.square()).abs_() * corrected2
        return gradient


@dataclass(frozen=True)
class ResetMoments:
    """Moments begin anew with each basis: the inner problem in B of the lazy update W + B V^T (arXiv 2603.20632) begins at
    B = 0 with an optimizer of its own."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        if at.before is not None:
            for name in ("exp_avg", "exp_avg_sq"):
                state.pop(name, None)
            state["began"] = at.step - 1
        return gradient


@dataclass(frozen=True)
class Scale:
    """The update times ``alpha``, of gradients in factors only."""

    alpha: float = 1.0

    @property
    def defaults(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        return gradient * at.group["alpha"] if at.basis is not None else gradient

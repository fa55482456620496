"""Pieces of optimizers: functions from a gradient to an update, with state of plain tensors.

A transform sees what it is given as numbers: the coefficients (..., M, R) of a gradient in factors, or a dense gradient of any
shape. It keeps what it needs in the parameter's state under names of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from actpass.codecs import contract
from actpass.codecs.generator import normals, round_keys
from actpass.codecs.projections.orthonormal import orthonormal
from actpass.low_rank_gradient import Basis
from actpass.torch_compat import pinv, qr, vector_norm

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_left", "momentum_right", "error")
"""The names under which transforms keep what is forgotten where a gradient becomes one of another kind."""


@dataclass(frozen=True)
class Place:
    """Where a gradient lies. basis: what it is in factors of, None: it is dense. left: see `LowRankGradient`. before: the basis
    of the step before, if it was another. step: of this parameter, the first is 1. group: the parameter group's options. name:
    the parameter's, where the optimizer was given names."""

    step: int
    group: dict[str, Any]
    basis: Basis | None = None
    left: bool = False
    before: Basis | None = None
    name: str | None = None

    def overlap(self) -> tuple[torch.Tensor, torch.Tensor]:
        """O (R_old, R): coefficients in the basis before are G P_old of a gradient G, and times O those in this one, G P: exact
        for what lies in both, where columns are orthogonal, whatever their lengths (those of ``sampled`` are weights). And E
        (R_old, R), for directions of which the basis before has less than a random one of its rank would, R_old / N: squares
        of coefficients times E are their mean, at unit length, times the squared length of what is missing."""
        assert self.basis is not None
        assert self.before is not None
        old, new = self.before.matrix(), self.basis.matrix()
        lengths = old.square().sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        overlap = (old / lengths).t() @ new
        width, rank = old.shape
        missing = (rank / width * new.square().sum(dim=0) - lengths @ overlap.square()).clamp_min(0)
        return overlap, torch.outer(1 / (rank * lengths), missing)

    def carry(self, moment: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
        """``moment``, which has the shape of coefficients in the old basis, through ``overlap``."""
        overlap = overlap.to(moment.dtype)
        return overlap.t() @ moment if self.left else moment @ overlap

    def moments(self, state: State) -> int:
        """How many gradients the moments have seen."""
        return self.step - int(state.get("began", 0))


@dataclass(frozen=True)
class Ratio:
    """An update that is ``times * above / below``, which need not be formed (``addcdiv_``): an embedding's would be a tensor as
    large as it."""

    above: torch.Tensor
    below: torch.Tensor
    times: float = 1.0

    def formed(self) -> torch.Tensor:
        return self.above.div(self.below).mul_(self.times)


Update = torch.Tensor | Ratio


def forget(state: State) -> None:
    """Drop all moments."""
    for name in MOMENTS:
        state.pop(name, None)


class Transform(Protocol):
    """Turns a gradient, or what the transform before it made of it, into an update. defaults: options that a parameter group
    may set, with their defaults."""

    @property
    def defaults(self) -> dict[str, Any]: ...
    def __call__(self, gradient: Any, state: State, at: Place) -> Update: ...


@dataclass(frozen=True)
class Adam:
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, m^ / (sqrt(v^) + eps), hats corrected for bias (D. Kingma, J. Ba, 2015,
    arXiv 1412.6980). State: two tensors of the gradient's shape, of the coefficients' for one in factors. Transforms in
    front of it may have carried them to another basis."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.999), "eps": 1e-8}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> Ratio:
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(gradient) for _ in range(2))
        beta1, beta2 = at.group["betas"]
        seen = at.moments(state)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return Ratio(m, v.sqrt().div_((1 - beta2**seen) ** 0.5).add_(at.group["eps"]), 1 / (1 - beta1**seen))


@dataclass(frozen=True)
class PartialMomentum:
    """Adam with as much first moment as a block needs (AdaPM, Y. Zhang, Y. Liu, C. Fang, 2025, arXiv 2510.09103).

    m is kept whole (``momentum="full"``), not at all (``"none"``: the update is g / (sqrt(v^) + eps)), or as L R^T of rank r
    (``"low_rank"``, matrices only): Y = b1 L R^T + (1 - b1) g; R becomes the orthonormal basis of one power step,
    Y^T Y R, and L = Y R. What this drops, Y - L R^T, would have been averaged on; were it the same at every step, the average
    would grow to 1 / (1 - b1) of it. That much is put into the update:

        m^ = L R^T / (1 - b1^t) + (Y - L R^T) / (1 - b1)

    which is Adam's m^ at full rank and g at rank 0. The kinds of blocks, and that the residual corrects the bias, are the
    paper's; its equation was not at hand: this one is this project's own, as is the default rank. The second moment is
    Adam's, or with ``second_moment="row"`` one number per row of a matrix, its mean (Adam-mini, Y. Zhang et al., 2025, arXiv
    2406.16793).
    State: of M x N, (M + N) r numbers for m, and M N or M for v. Costs 6 M N r FLOPs more a step. Works on the coefficients of
    a gradient in factors as on a dense gradient.
    """

    @property
    def defaults(self) -> dict[str, Any]:
        return {
            "betas": (0.9, 0.999), "eps": 1e-8, "momentum": "auto", "momentum_rank": 1 / 32, "second_moment": "full",
        }  # fmt: skip

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> Ratio:
        beta1, beta2 = at.group["betas"]
        kind = momentum_kind(at.group["momentum"], at.name, gradient)
        form = MOMENTUM.index(kind) * 2 + (at.group["second_moment"] == "row")
        if state.setdefault("momentum_form", form) != form:  # the group's options were changed
            forget(state)
            state["momentum_form"], state["began"] = form, at.step - 1
        seen = at.moments(state)
        size = self._second(gradient, state, at, beta2).div(1 - beta2**seen).sqrt_().add_(at.group["eps"])
        if kind == "none":
            return Ratio(gradient, size)
        if kind == "full":
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(gradient)
            return Ratio(state["exp_avg"].lerp_(gradient, 1 - beta1), size, 1 / (1 - beta1**seen))
        return Ratio(self._low_rank(gradient, state, at, beta1, seen), size)

    def _second(self, gradient: torch.Tensor, state: State, at: Place, beta: float) -> torch.Tensor:
        if at.group["second_moment"] == "full" or gradient.dim() < 2:
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(gradient)
            return state["exp_avg_sq"].mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
        dim = -2 if at.left else -1
        mean = vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.shape[dim])
        return state.setdefault("exp_avg_sq", torch.zeros_like(mean)).lerp_(mean, 1 - beta)

    def _low_rank(self, gradient: torch.Tensor, state: State, at: Place, beta: float, seen: int) -> torch.Tensor:
        rows, columns = gradient.shape
        given = gradient.dtype
        wide = torch.promote_types(given, torch.float32)  # the rounding of what is dropped counts 1 / (1 - b1) times
        if "momentum_left" in state:
            left, right = (state[f"momentum_{side}"].to(wide) for side in ("left", "right"))
        else:
            rank = momentum_rank(at.group["momentum_rank"], min(rows, columns))
            left = gradient.new_zeros(rows, rank, dtype=wide)
            noise = normals(round_keys(0, gradient.device), columns, columns * rank).view(columns, rank)
            right = orthonormal(noise.double()).to(wide)
        y = torch.addmm(gradient.to(wide), left, right.t(), beta=1 - beta, alpha=beta)
        tiny = torch.finfo(torch.float32).tiny
        through = y @ right
        turned = (y.t() @ through.div_(vector_norm(y, float("inf")).clamp_min(tiny))).double()
        # a part of the old directions keeps those that y has nothing of: the basis never loses rank
        turned += (1e-6 * vector_norm(turned) + tiny) * right
        turned /= vector_norm(turned, dim=0)
        right = orthonormal(turned).to(wide).contiguous()
        left = y @ right
        state["momentum_left"], state["momentum_right"] = left.to(given), right.to(given)
        kept = 1 / (1 - beta**seen)
        return y.div_(1 - beta).addmm_(left, right.t(), alpha=kept - 1 / (1 - beta)).to(given)


MOMENTUM = ("auto", "none", "low_rank", "full")
SECOND_MOMENT = ("full", "row")
_KINDS = (
    (
        "none",
        r"embed(?!_out)(?![^.]*(proj|mapping))[^.]*\.weight$|embeddings?\b|\bshared\.|\bwte\b|\bwpe\b|o_proj|out_proj|out_lin|\bto_out\b"
        r"|attention\.output\.dense|(attn|attention)\.(c_proj|proj|wo|dense|o)\b",
    ),
    ("full", r"v_proj|v_lin|attention\.v\b|\bvalue(_|\b)|\bto_v\b|\bwv\b|c_attn|qkv|query_key_value|in_proj"),
)
"""Kinds of blocks by their names in `transformers` and torch, in lower case: embeddings and attention's output, values (and
what holds them together with queries and keys). Every other matrix is low-rank."""


def momentum_kind(given: str, name: str | None, gradient: torch.Tensor) -> str:
    """``none``, ``low_rank`` or ``full`` for ``given``, which may be ``auto``."""
    if gradient.dim() != 2:
        return "full" if given == "low_rank" or given == "auto" else given
    if given != "auto":
        return given
    assert name is not None
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), "low_rank")


def momentum_rank(given: float, most: int) -> int:
    """Directions, of at most ``most``; a float is a fraction of them."""
    return max(1, min(most, given if isinstance(given, int) else round(given * most)))


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
    coordinate; this rule is this project's choice. So is what is added for a direction that the old basis has little of: the
    mean of v over that basis, up to the share, R / N, that a random basis would have of it. With nothing in its place the first
    steps along it are 1 / sqrt(1 - b2) of a step (AdaPM with ``sampled``, drawn at each step, diverged); with all of the mean,
    AdaPM with ``haar`` learned less (llama-mini, N/4: loss 1.599, without 1.572)."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        if at.before is None or "exp_avg_sq" not in state:
            return gradient
        overlap, expected = at.overlap()
        if "momentum_left" in state:
            left, right = (state[f"momentum_{side}"].to(overlap.dtype) for side in ("left", "right"))
            if at.left:
                left = overlap.t() @ left
            else:  # orthonormal again, whatever the overlap took of it
                right, triangle = qr(overlap.t() @ right)
                left = left @ triangle.t()
            state["momentum_left"], state["momentum_right"] = left.to(gradient.dtype), right.to(gradient.dtype).contiguous()
        v, m = state["exp_avg_sq"], state.get("exp_avg")
        if at.group.get("second_moment") == "row":  # a mean over the basis, the same in any other
            if m is not None:
                state["exp_avg"] = at.carry(m, overlap)
            return gradient
        beta1, beta2 = at.group["betas"]
        done = at.moments(state) - 1
        corrected1, corrected2 = 1 - beta1**done, 1 - beta2**done
        mean = torch.zeros_like(v) if m is None else m / corrected1
        carried = at.carry(mean, overlap)
        spread = at.carry(v / corrected2 - mean.square(), overlap.square())
        if m is not None:
            state["exp_avg"] = carried * corrected1
        state["exp_avg_sq"] = (spread + carried.square()).abs_() * corrected2 + at.carry(v, expected)
        return gradient


@dataclass(frozen=True)
class ErrorFeedback:
    """What a change of basis takes from the first moment is kept, and comes back where a later basis has it.

    The moment in factors, lifted, plus the error E is the moving average of all gradients: at a change, the whole is
    projected (least squares) on the new basis, E is the rest, and E decays as the moment does. After the idea of error feedback
    (F. Seide et al., 2014; LDAdam's, arXiv 2410.16103, keeps the gradient's error, which needs the dense gradient that is never
    formed here). State: one tensor of the parameter's size. moved: what carries the other moments over.
    """

    moved: Transform = field(default_factory=CarryMoments)

    @property
    def defaults(self) -> dict[str, Any]:
        return {**self.moved.defaults, "error_feedback": False}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> Update:
        if not at.group["error_feedback"]:
            state.pop("error", None)  # of before the option was turned off
        if not at.group["error_feedback"] or at.basis is None or "exp_avg" not in state:
            return self.moved(gradient, state, at)
        whole = None
        if at.before is not None:
            whole = contract(state["exp_avg"], at.before.matrix().to(gradient.dtype), left=at.left)
            if "error" in state:
                whole += state["error"]
        moved = self.moved(gradient, state, at)
        if whole is not None:
            p = at.basis.matrix()
            inverse = pinv(p).to(gradient.dtype)  # (R, N); a basis may have columns that depend on others
            p = p.to(gradient.dtype)
            state["exp_avg"] = inverse @ whole if at.left else whole @ inverse.t()
            state["error"] = whole - contract(state["exp_avg"], p, left=at.left)
        if "error" in state:
            state["error"].mul_(at.group["betas"][0])
        return moved


@dataclass(frozen=True)
class ResetMoments:
    """Moments begin anew with each basis: the inner problem in B of the lazy update W + B V^T (arXiv 2603.20632) begins at
    B = 0 with an optimizer of its own."""

    @property
    def defaults(self) -> dict[str, Any]:
        return {}

    def __call__(self, gradient: torch.Tensor, state: State, at: Place) -> torch.Tensor:
        if at.before is not None:
            forget(state)
            state["began"] = at.step - 1
        return gradient


@dataclass(frozen=True)
class Scale:
    """The update times ``alpha``, of gradients in factors only."""

    alpha: float = 1.0

    @property
    def defaults(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def __call__(self, gradient: Update, state: State, at: Place) -> Update:
        if at.basis is None:
            return gradient
        alpha = at.group["alpha"]
        return replace(gradient, times=gradient.times * alpha) if isinstance(gradient, Ratio) else gradient * alpha

"""The one optimizer class: a chain of transforms, and the step in the parameter's own space."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from actpass.codecs.generator import round_keys
from actpass.codecs.precision import as_written
from actpass.errors import ActpassWarning
from actpass.low_rank_gradient import Basis, LowRankGradient
from actpass.optim.transforms import MOMENTS, MOMENTUM, SECOND_MOMENT, Place, Ratio, State, Transform, Update, forget
from actpass.torch_compat import uncompiled

_BASIS = ("basis_draw", "basis_method", "basis_rank", "basis_unbiased", "basis_width", "basis_left", "basis_subspace")
_RESTLESS = 10
RESTLESS = (
    f"{_RESTLESS} optimizer steps in a row had another random basis each: moments of one mean little in the next, and a model "
    'learns badly. Give options={"refresh_interval": 20} or more, without "resample": "every_step" of prac and sampled; or '
    '"weight_gradient_format": "dense" if each step is to have its own.'
)


class ComposedOptimizer(torch.optim.Optimizer):
    """W <- (1 - lr * weight_decay) W - lr * lift(update), update = transforms applied to the gradient one after the other.

    params: as of any torch optimizer, named ones as well. transforms: see `actpass.optim.transforms`; their options are those
    of the parameter groups. lr, weight_decay (decoupled): of every group. A gradient in factors (`LowRankGradient`) is never
    formed: the update of its coefficients is lifted straight into the weight (``addmm_``). State: the transforms' tensors, in
    the shape of the coefficients, and what the basis is drawn from. Raises `ValueError` for options out of range.
    """

    takes_low_rank_gradients = True
    for_low_rank: ClassVar[bool] = False
    """Whether it is for low-rank gradients alone: for dense ones it is AdamW."""

    def __init__(
        self, params: Iterable[Any], transforms: Sequence[Transform], *, lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        self.transforms = tuple(transforms)
        known: dict[str, Any] = {k: v for t in self.transforms for k, v in t.defaults.items()}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}. Known: lr, weight_decay, {', '.join(known)}.")
        # of the last step; the state has it to be saved
        self._bases: MutableMapping[torch.Tensor, Basis] = WeakIdKeyDictionary()
        self._redrawn = 0  # steps in a row with another random basis each
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **known, **options})
        for group in self.param_groups:
            _check(group, self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "transforms": self.transforms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:  # of before an option was there, or of another optimizer
            for name, value in defaults.items():
                group.setdefault(name, value)
            _check(group, defaults)
        super().__setstate__(state)
        self._bases, self._redrawn = WeakIdKeyDictionary(), 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().load_state_dict(state_dict)
        self._bases = WeakIdKeyDictionary()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            subspace = state_dict["state"].get(number, {}).get("basis_subspace")
            if subspace is not None:  # torch has cast it to the parameter's dtype
                self.state[parameter]["basis_subspace"] = subspace.to(parameter.device, torch.float32, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1], self.defaults)
        except ValueError:
            self.param_groups.pop()
            raise

    @uncompiled  # Dynamo 2.13 mixes up the states of parameters behind a graph break
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        redrawn = False
        for group in self.param_groups:
            for parameter, name in zip(group["params"], _names(group), strict=True):
                if parameter.grad is not None and parameter.numel():
                    with as_written(parameter.device):
                        redrawn |= self._update(parameter, parameter.grad, group, name)
        self._redrawn = self._redrawn + 1 if redrawn else 0
        if self._redrawn == _RESTLESS:
            warnings.warn(RESTLESS, ActpassWarning, stacklevel=2)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], name: str | None) -> bool:
        """Move one parameter. True: in a random basis that is another than the last step's."""
        if gradient.is_sparse:
            raise RuntimeError("sparse gradients are not supported. Allowed: dense ones, or low-rank ones in factors.")
        state: State = self.state[parameter]
        step = int(state.get("step", 0)) + 1
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")  # as torch's; whatever the defaults are
        if _side(gradient) != _side_before(state):  # or dense where it was in factors: the moments are of another kind
            self._bases.pop(parameter, None)
            _begin_anew(state)
        if isinstance(gradient, LowRankGradient) and gradient.is_factored:
            place = Place(step, group, gradient.basis, gradient.left, self._before(parameter, state, gradient.basis), name)
            numbers = gradient.coefficients
            self._remember(parameter, state, gradient)
        else:
            place = Place(step, group, name=name)
            numbers = gradient.dense() if isinstance(gradient, LowRankGradient) else gradient
        update: Update = numbers
        for transform in self.transforms:
            update = transform(update, state, place)
        lr = group["lr"]
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        if place.basis is None and isinstance(update, Ratio):
            parameter.addcdiv_(update.above, update.below, value=-float(lr) * update.times)
            return False
        update = update.formed() if isinstance(update, Ratio) else update
        if place.basis is None:
            parameter.add_(update.to(parameter.dtype), alpha=-float(lr))
        else:
            _lift(parameter, update, place.basis, place.left, -float(lr))
        before, basis = place.before, place.basis
        return before is not None and basis is not None and before.draws and before.draw != basis.draw

    def _before(self, parameter: torch.Tensor, state: State, basis: Basis) -> Basis | None:
        """The basis of the step before, if it was another."""
        before = self._bases.get(parameter)
        if before is None and "basis_draw" in state:  # loaded
            key = round_keys(state["basis_draw"], parameter.device)
            rank, unbiased = state["basis_rank"], bool(state["basis_unbiased"])
            projection = _name_of(int(state["basis_method"]))
            subspace = state.get("basis_subspace")
            if subspace is not None and basis.state is not None and torch.equal(subspace, basis.state):
                subspace = basis.state
            before = Basis(projection, basis.width, rank, key, state["basis_draw"], unbiased, subspace)
        return None if before is None or before.spans_as(basis) else before

    def _remember(self, parameter: torch.Tensor, state: State, gradient: LowRankGradient) -> None:
        """What the basis can be made of again, in numbers, which is all that torch loads."""
        basis = gradient.basis
        state["basis_width"], state["basis_left"] = basis.width, gradient.left
        state["basis_draw"], state["basis_method"] = basis.draw, _number_of(basis.projection)
        state["basis_rank"], state["basis_unbiased"] = basis.rank, basis.unbiased
        if basis.state is not None:
            state["basis_subspace"] = basis.state
        else:
            state.pop("basis_subspace", None)
        self._bases[parameter] = basis


def _number_of(name: str) -> int:
    """A name as a number: torch loads strings in an optimizer's state as something else, and flattens only numbers."""
    return int.from_bytes(name.encode(), "big")


def _name_of(number: int) -> str:
    return number.to_bytes(-(-number.bit_length() // 8), "big").decode()


def _side(gradient: torch.Tensor) -> tuple[int, bool] | None:
    """What a gradient is in factors of, and from which side; None: it is dense. One graph may read a weight as x W, another as
    x W^T."""
    if isinstance(gradient, LowRankGradient) and gradient.is_factored:
        return gradient.basis.width, gradient.left
    return None


def _side_before(state: State) -> tuple[int, bool] | None:
    return (int(state["basis_width"]), bool(state["basis_left"])) if "basis_width" in state else None


def _lift(parameter: torch.Tensor, update: torch.Tensor, basis: Basis, left: bool, size: float) -> None:
    """parameter += size * lift(update), in place."""
    p = basis.matrix().to(parameter.dtype)
    update = update.to(parameter.dtype)
    if parameter.dim() == 2:
        parameter.addmm_(*((p, update) if left else (update, p.t())), alpha=size)
        return
    wide = p.expand(parameter.shape[0], *p.shape)
    parameter.baddbmm_(*((wide, update) if left else (update, wide.transpose(1, 2))), alpha=size)


def _begin_anew(state: State) -> None:
    """Forget moments and basis; corrections for bias count from here."""
    if any(name in state for name in (*MOMENTS, *_BASIS)):
        forget(state)
        for name in _BASIS:
            state.pop(name, None)
        state["began"] = int(state["step"]) - 1


def _names(group: dict[str, Any]) -> list[str | None]:
    """One for each parameter; torch lets a user move parameters to another group without their names."""
    names: list[str | None] = group.get("param_names") or []
    if len(names) == len(group["params"]):
        return names
    if names and group.get("momentum") == "auto":
        raise ValueError(
            f"a group has {len(group['params'])} parameters and {len(names)} names, by which momentum='auto' goes. Move "
            "'param_names' along with 'params', or set the group's momentum to 'none', 'low_rank' or 'full'."
        )
    return [None] * len(group["params"])


def _check(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise for an option among ``known`` that is out of range; a state of another optimizer may have more of them."""

    def not_negative(x: Any) -> bool:
        return float(x) >= 0

    number = "a number of 0 or more"
    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (not_negative, number),
        "weight_decay": (not_negative, number),
        "betas": (lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
        "eps": (not_negative, number),
        "alpha": (lambda alpha: alpha > 0, "a number above 0"),
        "momentum": (lambda kind: kind in MOMENTUM, ", ".join(map(repr, MOMENTUM))),
        "second_moment": (lambda kind: kind in SECOND_MOMENT, ", ".join(map(repr, SECOND_MOMENT))),
        "momentum_rank": (
            lambda rank: rank >= 1 if isinstance(rank, int) else 0 < rank <= 1,
            "an int of 1 or more, or a fraction in (0, 1] of a matrix's smaller side",
        ),
    }
    for name, (fits, what) in allowed.items():
        if name in known and not _holds(fits, group[name]):
            raise ValueError(f"{name}={group[name]!r} is not usable. Allowed: {what}.")
    if "momentum" in known and group["momentum"] == "auto" and not group.get("param_names"):
        raise ValueError(
            "momentum='auto' goes by the parameters' names. Give model.named_parameters() in place of model.parameters(), or "
            "one of 'none', 'low_rank' and 'full' for each group."
        )


def _holds(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(test(value))
    except (TypeError, ValueError):  # another optimizer's, of another kind
        return False

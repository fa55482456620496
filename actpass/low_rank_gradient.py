"""A gradient that is kept in its factors, G = C Pᵀ, and that is a gradient to everything else.

`LowRankGradient` has the parameter's shape and dtype and holds coefficients and a basis. What training loops and optimizers do
to gradients in place is done to the coefficients: accumulation in one subspace, scaling, zeroing, norms, `clip_grad_norm_`,
`torch.amp.GradScaler`. Any other operator sees the dense gradient, formed for it alone; one that writes to it
makes the gradient dense for good. So every optimizer of torch is right with it, compiled or not, and those of `actpass.optim`
are frugal, too. Any other gets dense gradients before its step (`actpass.runtime.low_rank_binding`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils import _pytree as pytree

from actpass.codecs import LEARNED, PROJECTIONS, contract
from actpass.codecs.precision import as_written
from actpass.errors import ActpassWarning
from actpass.torch_compat import let_load, uncompiled, vector_norm

aten = torch.ops.aten

SHARDED = (
    "FSDP2 makes low-rank gradients dense, in its reduce-scatter: they are right, but take the memory of dense ones and as "
    "many bytes between ranks. Use DistributedDataParallel and actpass.distributed.reduce_low_rank to keep them in factors."
)


@dataclass(eq=False)
class Basis:
    """P (N, R), made when it is asked for. method: a projection's name. key: `round_keys` of the seed that it is drawn from.
    draw: the seed itself. state: the subspace that a learned one is built from."""

    projection: str
    width: int
    rank: int
    key: torch.Tensor
    draw: int
    unbiased: bool = True
    state: torch.Tensor | None = None
    made: torch.Tensor | None = field(default=None, repr=False)

    def spans_as(self, other: Basis) -> bool:
        """Whether it is the same basis, so that coefficients may be added. Of a learned one, the same tensor: a subspace that
        moved is another."""
        mine, others = (
            (b.projection, b.width, b.rank, b.draw if b.draws else None, b.unbiased, b.key.device) for b in (self, other)
        )
        return self is other or (mine == others and self.state is other.state)

    @property
    def draws(self) -> bool:
        """Whether any part of it is random."""
        return self.projection in PROJECTIONS or LEARNED[self.projection].draws

    def matrix(self) -> torch.Tensor:
        """P in float32, kept as long as this object."""
        if self.made is None:
            with as_written(self.key.device):
                if self.state is None:
                    projection = PROJECTIONS[self.projection]
                    self.made = projection.basis(self.key, self.width, self.rank, unbiased=self.unbiased, dtype=torch.float32)
                else:
                    learned = LEARNED[self.projection]
                    self.made = learned.draw(self.state, learned.noise(self.key, self.width, self.rank), self.rank)
        return self.made


@dataclass(eq=False)
class _Held:
    """What a gradient is, shared by all that show it (``.data``, ``.detach()``). dense: set once something had to write to all
    of it; the coefficients are gone then. is_zero: whether it was zeroed since, and may take up another subspace."""

    coefficients: torch.Tensor
    basis: Basis
    left: bool
    dense: torch.Tensor | None = None
    is_zero: bool = False


class LowRankGradient(torch.Tensor):
    """The gradient of a parameter of ``shape``, in factors.

    left=False: coefficients C (..., M, R), G = C Pᵀ (..., M, N). left=True: C (..., R, M), G = P C (..., N, M), for weights
    that are stored (in, out). Takes the bytes of C; the basis is shared. `dense` gives an ordinary tensor of the same numbers
    (for what reads memory itself, like ``.numpy()``).
    """

    held: _Held

    @staticmethod
    def __new__(cls: type[LowRankGradient], coefficients: torch.Tensor, basis: Basis, *, left: bool) -> LowRankGradient:
        *outer, rows, columns = coefficients.shape
        shape = (*outer, basis.width, columns) if left else (*outer, rows, basis.width)
        made: Any = torch.Tensor._make_wrapper_subclass
        return made(cls, shape, dtype=coefficients.dtype, device=coefficients.device)

    def __init__(self, coefficients: torch.Tensor, basis: Basis, *, left: bool) -> None:
        self.held = _Held(coefficients, basis, left)

    @property
    def coefficients(self) -> torch.Tensor:
        return self.held.coefficients

    @property
    def basis(self) -> Basis:
        return self.held.basis

    @property
    def left(self) -> bool:
        return self.held.left

    @property
    def is_factored(self) -> bool:
        """Whether it still is in its factors: an operator that had to write to all of it has made it dense."""
        return self.held.dense is None

    @uncompiled  # in a compiled frame Dynamo would compile what it calls, with symbolic widths, which overflow in a seed
    def dense(self) -> torch.Tensor:
        """An ordinary tensor of the same numbers."""
        if self.held.dense is not None:
            return self.held.dense
        c = self.coefficients
        with as_written(c.device):
            return contract(c, self.basis.matrix().to(c.dtype), left=self.left)

    def densify(self) -> torch.Tensor:
        """Make it dense for good, and return what it is now."""
        held = self.held
        if held.dense is None:
            held.dense = self.dense()
            held.coefficients = held.coefficients.new_empty(0)
        held.is_zero = False
        return held.dense

    def shown(self) -> LowRankGradient:
        """Another tensor that is the same gradient: what is written to one is written to both."""
        return self._of(self.held, self.dtype, self.device)

    def _of(self, held: _Held, dtype: torch.dtype, device: torch.device) -> LowRankGradient:
        made: Any = torch.Tensor._make_wrapper_subclass
        other = made(LowRankGradient, self.shape, dtype=dtype, device=device)
        other.held = held
        return other

    def with_coefficients(self, coefficients: torch.Tensor) -> LowRankGradient:
        """Another gradient in the same subspace."""
        return LowRankGradient(coefficients, self.basis, left=self.left)

    def adds_to(self, other: object) -> bool:
        """Whether both are in factors, in one subspace."""
        return (
            isinstance(other, LowRankGradient)
            and self.is_factored
            and other.is_factored
            and self.left == other.left
            and self.shape == other.shape
            and self.basis.spans_as(other.basis)
        )

    def squared_norm(self) -> torch.Tensor:
        """|G|^2 = tr(C PᵀP Cᵀ), in float32 at least."""
        c = self.coefficients.to(torch.promote_types(self.dtype, torch.float32))
        p = self.basis.matrix().to(c.dtype)
        with as_written(c.device):
            through = (p.t() @ p) @ c if self.left else c @ (p.t() @ p)
        return (through * c).sum().clamp_min(0)

    @property
    def data(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if new.shape != self.shape:
            raise TypeError(
                f"a low-rank gradient of {tuple(self.shape)} can't become a tensor of {tuple(new.shape)}. Allowed: the same "
                "shape. Clear the gradients first (zero_grad)."
            )
        if not isinstance(new, LowRankGradient):
            held = _Held(new.new_empty(0), self.basis, self.left, dense=new.detach())
            new = self._of(held, new.dtype, new.device)
        data: Any = torch.Tensor.data
        data.__set__(self, new)
        self.held = new.held

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        what = f"{self.basis.projection}, rank {self.basis.rank}" if self.is_factored else "dense"
        return f"LowRankGradient({tuple(self.shape)}, {self.dtype}, {what})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = self.clone()
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_factored:
            dense: Any = self.dense()
            return dense.__reduce_ex__(protocol)
        b = self.basis
        return _rebuilt, (self.coefficients, (b.projection, b.width, b.rank, b.key, b.draw, b.unbiased, b.state), self.left)

    @classmethod
    @uncompiled
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _densely(func, args, kwargs)


def _rebuilt(coefficients: torch.Tensor, basis: tuple[Any, ...], left: bool) -> LowRankGradient:
    return LowRankGradient(coefficients, Basis(*basis), left=left)


let_load(_rebuilt)  # a momentum that is one, in an optimizer's state


def _densely(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dense gradients. What it writes to, or gives a view of, stays dense, and is returned as it was given."""
    if func.namespace == "fsdp":
        warnings.warn(SHARDED, ActpassWarning, stacklevel=2)
    kept = _kept(func, args, kwargs)
    back: dict[int, LowRankGradient] = {}

    def dense(x: Any) -> Any:
        if not isinstance(x, LowRankGradient):
            return x
        if not any(x is k for k in kept):
            return x.dense()
        found = x.densify()
        back[id(found)] = x
        return found

    args, kwargs = pytree.tree_map(dense, (args, kwargs))

    def as_given(x: Any) -> Any:
        return back.get(id(x), x)

    return pytree.tree_map(as_given, func(*args, **kwargs))


def _kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to or returns views of. A collective writes to what it is given without saying."""
    schema = func._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    all_of_them = func.namespace == "c10d"
    marked = [given[a.name] for a in schema if (a.alias_info is not None or all_of_them) and a.name in given]
    return pytree.tree_leaves(marked)


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) or (isinstance(x, torch.Tensor) and not isinstance(x, LowRankGradient) and x.dim() == 0)


@_handles(aten.detach.default, aten.alias.default)
def _same(func: Any, x: LowRankGradient) -> Any:
    return x.shown()


@_handles(aten.clone.default)
def _clone(func: Any, x: LowRankGradient, **_: Any) -> Any:
    return _copied(x, x.coefficients.clone()) if x.is_factored else x.dense().clone()


def _copied(x: LowRankGradient, coefficients: torch.Tensor) -> LowRankGradient:
    """What was zeroed may take up another subspace as a copy, too."""
    copy = x.with_coefficients(coefficients)
    copy.held.is_zero = x.held.is_zero
    return copy


@_handles(aten._to_copy.default)
def _to(func: Any, x: LowRankGradient, **kwargs: Any) -> Any:
    device, dtype = kwargs.get("device"), kwargs.get("dtype") or x.dtype
    if not x.is_factored or not dtype.is_floating_point or (device is not None and torch.device(device) != x.device):
        return NotImplemented
    return _copied(x, func(x.coefficients, **{k: v for k, v in kwargs.items() if k != "memory_format"}))


@_handles(aten.new_empty_strided.default)
def _empty(func: Any, x: LowRankGradient, *args: Any, **kwargs: Any) -> Any:
    """What autograd clones into."""
    size = tuple(args[0]) if args else tuple(x.shape)
    if not x.is_factored or size != tuple(x.shape) or kwargs.get("dtype") not in (None, x.dtype):
        return NotImplemented
    return x.with_coefficients(torch.empty_like(x.coefficients))


@_handles(aten.copy_.default)
def _copy(func: Any, x: Any, source: Any, *_: Any) -> Any:
    if not isinstance(x, LowRankGradient) or not x.adds_to(source):
        return NotImplemented
    x.coefficients.copy_(source.coefficients)
    x.held.is_zero = False
    return x


@_handles(aten.zero_.default)
def _zero(func: Any, x: LowRankGradient) -> Any:
    x.held.is_zero = True
    return _in_place(func, x)


@_handles(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _scale(func: Any, x: Any, by: Any) -> Any:
    return _in_place(func, x, by) if isinstance(x, LowRankGradient) and _is_number(by) else NotImplemented


@_handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scaled(func: Any, x: Any, by: Any) -> Any:
    if isinstance(x, LowRankGradient) and x.is_factored and _is_number(by):
        return x.with_coefficients(func(x.coefficients, by))
    return NotImplemented


@_handles(aten.neg.default)
def _negated(func: Any, x: LowRankGradient) -> Any:
    return x.with_coefficients(-x.coefficients) if x.is_factored else NotImplemented


@_handles(aten.add_.Tensor, aten.sub_.Tensor)
def _add(func: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LowRankGradient):
        return NotImplemented
    if x.held.is_zero and isinstance(y, LowRankGradient) and y.is_factored and x.shape == y.shape:
        held = x.held
        held.coefficients = torch.zeros_like(y.coefficients, dtype=x.dtype)
        held.basis, held.left, held.dense = y.basis, y.left, None
    if not x.adds_to(y):
        return NotImplemented
    func(x.coefficients, y.coefficients, **kwargs)
    x.held.is_zero = False
    return x


@_handles(aten.add.Tensor, aten.sub.Tensor)
def _added(func: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LowRankGradient) or not x.adds_to(y):
        return NotImplemented
    return x.with_coefficients(func(x.coefficients, y.coefficients, **kwargs))


def _in_place(func: Any, x: LowRankGradient, *args: Any) -> Any:
    func(x.coefficients if x.is_factored else x.dense(), *args)
    return x


@_handles(aten.linalg_vector_norm.default)
def _norm(func: Any, x: LowRankGradient, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if order != 2 or dim is not None or keepdim or not x.is_factored:
        return NotImplemented
    return x.squared_norm().sqrt().to(dtype or x.dtype)


@_handles(aten._foreach_norm.Scalar)
def _foreach_norm(func: Any, xs: Sequence[torch.Tensor], order: float = 2, dtype: Any = None) -> Any:
    return [vector_norm(x, order, dtype=dtype) for x in xs]


@_handles(aten._foreach_zero_.default)
def _foreach_zero(func: Any, xs: Sequence[torch.Tensor]) -> Any:
    for x in xs:
        x.zero_()


@_handles(aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_div_.Scalar, aten._foreach_div_.Tensor)
def _foreach_scale(func: Any, xs: Sequence[torch.Tensor], by: Any) -> Any:
    """The factored ones by their coefficients, all in one call."""
    if not _is_number(by):
        return NotImplemented
    func([numbers_of(x) for x in xs], by)
    return None


@_handles(aten._fused_adam_.default, aten._fused_adamw_.default, aten._fused_sgd_.default, aten._fused_adagrad_.default)
def _fused(func: Any, parameters: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
    """It writes to gradients only where it has to unscale them."""
    if kwargs.get("grad_scale") is not None:
        return NotImplemented
    return _densely(func, (parameters, [g.dense() if isinstance(g, LowRankGradient) else g for g in gradients], *args), kwargs)


@_handles(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale(func: Any, xs: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> Any:
    """By the coefficients, which are what could be infinite."""
    func([numbers_of(x) for x in xs], found_inf, inv_scale)
    return None


def numbers_of(x: torch.Tensor) -> torch.Tensor:
    """The memory that holds what ``x`` is, up to its basis."""
    if not isinstance(x, LowRankGradient):
        return x
    return x.coefficients if x.is_factored else x.dense()


class Coefficients(torch.autograd.Function):
    """An input of a compiled region whose gradient is the coefficients of a parameter's: what comes back for it goes on as the
    parameter's gradient. It takes no memory. What the basis is drawn from is saved as autograd saves tensors: where a
    checkpoint runs the region again, perhaps at another step, the gradient lies in the basis of that run."""

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, basis: Basis, left: bool, shape: tuple[int, ...], copies: bool
    ) -> torch.Tensor:
        ctx.basis, ctx.left, ctx.copies = basis, left, copies
        state = basis.key if basis.state is None else basis.state
        ctx.save_for_backward(basis.key, torch.tensor(basis.draw, device="cpu"), state)
        return parameter.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, coefficients: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        basis: Basis = ctx.basis
        key, draw, state = ctx.saved_tensors
        # hooks on what is saved may give back a copy, as those that offload do
        moved = basis.state is not None and state is not basis.state and not torch.equal(state, basis.state)
        if int(draw) != basis.draw or moved:
            subspace = state if basis.state is not None else None
            basis = replace(basis, key=key, draw=int(draw), state=subspace, made=None)
        # two parameters may have one and the same; and a CUDA graph writes to its own again
        if ctx.copies or _GIVEN.get(coefficients.data_ptr()) is not None:
            coefficients = coefficients.clone()
        _GIVEN[coefficients.data_ptr()] = coefficients
        return LowRankGradient(coefficients, basis, left=ctx.left), None, None, None, None


_GIVEN: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
"""Coefficients that a gradient holds, by where they lie."""


def nbytes(gradient: torch.Tensor) -> int:
    """What a gradient takes: of one in factors, its coefficients."""
    numbers = numbers_of(gradient)
    return numbers.numel() * numbers.element_size()

"""What an attention mask allows, read off the graph that makes it, without ever making a tensor of queries x keys.

A mask compares a value of each query with one of each key (``key position <= query position``), and such a comparison allows
each query an interval of the keys where the keys' values are sorted. So a graph of operators is run on three kinds of values:
ordinary tensors (of which expanded axes take no memory), a `Difference` of a query's and a key's value that is not taken yet,
and a `Band`: two values, and where in each row the first of them stands. Padding, windows and packed sequences are bands, too.

The values of all inputs are known when it is run, so what comes out holds for these and for no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

MOST_ELEMENTS = 2**22
"""Of a tensor that is computed. What is larger, and no band, is unknown."""


@dataclass(frozen=True)
class Band:
    """A tensor of (..., Q, K) with the value ``inside`` where lo <= k < hi, and ``outside`` elsewhere.

    lo, hi: int64, (..., Q, 1), within [0, K]. inside, outside: of one element each.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    keys: int
    inside: torch.Tensor
    outside: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.lo.shape[:-1], self.keys))

    def has_edges_of(self, other: Band) -> bool:
        return _same(self.lo, other.lo) and _same(self.hi, other.hi)

    def map(self, edges: Callable[[torch.Tensor], torch.Tensor]) -> Band:
        """With the leading axes that ``edges`` makes of those of ``lo`` and ``hi``."""
        return Band(edges(self.lo), edges(self.hi), self.keys, self.inside, self.outside)


@dataclass(frozen=True)
class Difference:
    """``left - right``, of which one is a value of each query and the other of each key."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return _broadcast(self.left, self.right)


class Unknown:
    """A value that is none of these."""


UNKNOWN = Unknown()
Value = torch.Tensor | Band | Difference | Unknown


@dataclass(frozen=True)
class Allowed:
    """The keys that a mask allows each query: lo <= k < hi, (..., Q) each, of ``keys`` in all."""

    lo: torch.Tensor
    hi: torch.Tensor
    keys: int

    @property
    def is_all(self) -> bool:
        return bool((self.lo == 0).all() and (self.hi == self.keys).all())

    @property
    def is_causal(self) -> bool:
        """Whether each query is allowed the keys up to its own, of as many: what ``is_causal=True`` does."""
        own = torch.arange(1, self.hi.shape[-1] + 1)
        return self.hi.shape[-1] == self.keys and bool((self.lo == 0).all() and (self.hi == own).all())

    @property
    def longest(self) -> int:
        """The most keys that any query is allowed."""
        return int((self.hi - self.lo).max())


def allowed(mask: Value) -> Allowed | None:
    """What ``mask`` allows as `scaled_dot_product_attention` reads it: True, or 0 where False is -inf or the dtype's lowest
    number. None if it is unknown, or allows otherwise than in intervals."""
    if isinstance(mask, torch.Tensor) and mask.dim() > 1 and _is_uniform(mask):
        edge = torch.zeros((*mask.shape[:-1], 1), dtype=torch.int64)
        mask = Band(edge, edge + mask.shape[-1], mask.shape[-1], mask.flatten()[:1], mask.flatten()[:1])
    if not isinstance(mask, Band):
        return None
    inside, outside = _allows(mask.inside), _allows(mask.outside)
    lo, hi, keys = mask.lo, torch.maximum(mask.lo, mask.hi), mask.keys
    if inside and outside:
        lo, hi = torch.zeros_like(lo), torch.full_like(hi, keys)
    elif inside is False and outside:  # what is outside of a prefix or a suffix
        if bool((lo == 0).all()):
            lo, hi = hi, torch.full_like(hi, keys)
        elif bool((hi == keys).all()):
            lo, hi = torch.zeros_like(lo), lo
        else:
            return None
    elif not (inside and outside is False):
        return None
    return Allowed(lo.squeeze(-1), hi.squeeze(-1), keys)


def _allows(value: torch.Tensor) -> bool | None:
    """Whether a mask's element of this value lets a query attend, or None if it does something else."""
    if value.dtype == torch.bool:
        return bool(value)
    if not value.is_floating_point():
        return None
    if float(value) == 0:
        return True
    return False if float(value) <= torch.finfo(value.dtype).min else None


class MaskReader(fx.Interpreter):
    """Runs a graph of ATen operators on the kinds of values above, on the CPU whatever devices it names."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            made = super().run_node(n)
            return made.cpu() if isinstance(made, torch.Tensor) else made
        args, kwargs = cast(tuple[Any, Any], self.fetch_args_kwargs_from_env(n))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        values = [leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=_is_value) if _is_value(leaf)]
        if any(isinstance(v, Unknown) for v in values) or torch.Tag.nondeterministic_seeded in _tags(n.target):
            return UNKNOWN
        call = _Call(n.target, tuple(args), kwargs, values)
        if not all(isinstance(v, torch.Tensor) for v in values):
            return _on_bands(call)
        if n.target in _TRIANGLES:
            return _triangle(call)
        if _is_pointwise(n.target):
            return _pointwise(call)
        return _computed(call, n)


@dataclass(frozen=True)
class _Call:
    """An operator with its arguments. values: those that are tensors, bands or differences, in order."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: Sequence[Any]

    def on(self, values: Sequence[torch.Tensor]) -> Any:
        """Its result, with ``values`` in place of its own."""
        given = iter(values)

        def put(leaf: Any) -> Any:
            return next(given) if _is_value(leaf) else leaf

        args, kwargs = pytree.tree_map(put, (self.args, self.kwargs), is_leaf=_is_value)
        return self.target(*args, **kwargs)


def _broadcast(*values: Any) -> torch.Size:
    return cast(torch.Size, torch.broadcast_shapes(*(tuple(v.shape) for v in values)))  # pyright: ignore


def _is_value(x: Any) -> bool:
    return isinstance(x, torch.Tensor | Band | Difference | Unknown)


def _tags(target: Any) -> Sequence[torch.Tag]:
    return getattr(target, "tags", ())


def _is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in _tags(target) or target in (aten._to_copy.default, aten.clone.default)


# ----------------------------------------------------------------------------------------------------------------- ordinary


def _computed(call: _Call, node: fx.Node) -> Value:
    """What no rule is needed for."""
    made = node.meta.get("val")
    if not isinstance(made, torch.Tensor):
        return cast(Value, call.on(call.values))
    if call.target in (aten.full.default, aten.ones.default, aten.zeros.default, *_LIKES, *_NEW):
        return _uniform_of(call, made.shape)
    if call.target not in _VIEWS and made.numel() > MOST_ELEMENTS:
        return UNKNOWN
    if call.target in _MATMULS:
        return UNKNOWN  # autocast rounds them
    return cast(Value, call.on(call.values))


_LIKES = (aten.full_like.default, aten.ones_like.default, aten.zeros_like.default)
_NEW = (aten.new_full.default, aten.new_ones.default, aten.new_zeros.default)
_MATMULS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default, aten.dot.default)
_VIEWS = (aten.expand.default, aten.unsqueeze.default, aten.alias.default, aten.detach.default, aten.slice.Tensor)


def _uniform_of(call: _Call, shape: torch.Size) -> torch.Tensor:
    """``full`` and its like, of one element that is shown ``shape`` times."""
    small: tuple[Any, ...] = call.args
    if call.target in _LIKES:
        small = (call.values[0].new_zeros(1), *small[1:])
    elif call.target in _NEW:
        small = (call.values[0].new_zeros(1), (1,), *small[2:])
    else:
        small = ((1,), *small[1:])
    made: torch.Tensor = call.target(*small, **call.kwargs)
    return made.reshape(()).expand(shape)


def _pointwise(call: _Call) -> Value:
    """On tensors: of an axis along which none of them changes one element is computed."""
    tensors: list[torch.Tensor] = list(call.values)
    if not tensors:
        return cast(Value, call.on([]))
    shape = _broadcast(*tensors)
    if len(tensors) == 2 and _cross(tensors, shape):
        if call.target in _COMPARISONS:
            return compare(call.target, *tensors)
        is_plain = call.target is aten.sub.Tensor and not call.kwargs
        return Difference(*tensors) if is_plain else UNKNOWN
    changes = [any(_changes(t, axis - len(shape)) for t in tensors) for axis in range(len(shape))]
    if math.prod(n for n, changed in zip(shape, changes, strict=True) if changed) > MOST_ELEMENTS:
        return UNKNOWN
    made: torch.Tensor = call.on([_narrowed(t, changes) for t in tensors])
    return (made.flatten()[0] if made.numel() and _is_uniform(made) else made).expand(shape)


def _changes(t: torch.Tensor, axis: int) -> bool:
    """Whether ``t`` has several elements along ``axis`` (counted from the last, -1)."""
    return -axis <= t.dim() and t.shape[axis] > 1 and t.stride(axis) != 0


def _cross(tensors: Sequence[torch.Tensor], shape: torch.Size) -> bool:
    """Whether one changes along the queries and not along the keys, and the other the other way round."""
    if len(shape) < 2:
        return False
    by_query, by_key = ([_changes(t, axis) for t in tensors] for axis in (-2, -1))
    return by_query in ([True, False], [False, True]) and by_key == by_query[::-1]


def _narrowed(t: torch.Tensor, changes: Sequence[bool]) -> torch.Tensor:
    """With one element of every axis that does not change."""
    for axis in range(-t.dim(), 0):
        if not changes[axis]:
            t = t.narrow(axis, 0, min(1, t.shape[axis]))
    return t


def _is_uniform(t: torch.Tensor) -> bool:
    small = _narrowed(t, [_changes(t, axis) for axis in range(-t.dim(), 0)])
    return t.numel() > 0 and small.numel() <= MOST_ELEMENTS and bool((small == small.flatten()[0]).all())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a == b).all())


# -------------------------------------------------------------------------------------------------------------------- bands

_SWAPPED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
_COMPARISONS = {getattr(aten, name).Tensor: name for name in _SWAPPED}
_WITH_SCALARS = {getattr(aten, name).Scalar: name for name in _SWAPPED}
_TRIANGLES = (aten.tril.default, aten.triu.default)


def compare(target: Any, left: torch.Tensor, right: torch.Tensor) -> Value:
    """The `Band` of a comparison of a value of each query with one of each key. Unknown where the keys' are not sorted."""
    name = _COMPARISONS[target]
    if _changes(left, -1):
        name, left, right = _SWAPPED[name], right, left
    shape = _broadcast(left, right)
    lead, queries, keys = shape[:-2], shape[-2], shape[-1]
    if left.dtype == torch.bool or right.dtype == torch.bool:
        left, right = left.to(torch.int64), right.to(torch.int64)
    if left.dtype != right.dtype:
        to = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(to), right.to(to)
    changes = [any(_changes(t, axis - len(shape)) for t in (left, right)) for axis in range(len(lead))]
    small = [n if changed else 1 for n, changed in zip(lead, changes, strict=True)]
    of_query = _narrowed(left, [*changes, True, False]).expand(*small, queries, 1).squeeze(-1).contiguous()
    of_key = _narrowed(right, [*changes, False, True]).expand(*small, 1, keys).squeeze(-2).contiguous()
    if bool(of_query.isnan().any() or of_key.isnan().any()):
        return UNKNOWN
    if of_key.numel() > MOST_ELEMENTS or not bool((of_key[..., 1:] >= of_key[..., :-1]).all()):
        return UNKNOWN
    below, up_to = (torch.searchsorted(of_key, of_query, right=right) for right in (False, True))
    none, every = torch.zeros_like(below), torch.full_like(below, keys)
    lo, hi = {
        "ge": (none, up_to), "gt": (none, below), "le": (below, every), "lt": (up_to, every), "eq": (below, up_to),
        "ne": (below, up_to),
    }[name]  # fmt: skip
    inside = torch.tensor([name != "ne"])
    edges = [e.unsqueeze(-1).expand(*lead, queries, 1) for e in (lo, hi)]
    return Band(edges[0], edges[1], keys, inside, ~inside)


def _triangle(call: _Call) -> Value:
    """``tril`` and ``triu`` of a tensor whose elements are all equal."""
    (x,) = call.values
    if not _is_uniform(x):
        return UNKNOWN
    diagonal = int(call.args[1]) if len(call.args) > 1 else int(call.kwargs.get("diagonal", 0))
    queries, keys = x.shape[-2:]
    edge = (torch.arange(queries) + diagonal + (call.target is aten.tril.default)).clamp(0, keys).unsqueeze(-1)
    none, every = torch.zeros_like(edge), torch.full_like(edge, keys)
    lo, hi = (none, edge) if call.target is aten.tril.default else (edge, every)
    value = x.flatten()[:1]
    return Band(lo, hi, keys, value, torch.zeros_like(value)).map(lambda e: e.expand(*x.shape[:-1], 1))


def _on_bands(call: _Call) -> Value:
    first = call.values[0]
    if isinstance(first, Difference):
        return _compared_difference(call, first)
    if call.target in _VIEWS or call.target in (aten.view.default, aten._unsafe_view.default):
        return _view(call, first) if isinstance(first, Band) else UNKNOWN
    if not _is_pointwise(call.target) and call.target not in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return UNKNOWN
    return _combined(call)


def _compared_difference(call: _Call, difference: Difference) -> Value:
    """``left - right <= c`` as ``left <= right + c``, in whole numbers."""
    other = call.args[1] if call.target in _WITH_SCALARS and len(call.args) > 1 else None
    whole = difference.left.dtype == difference.right.dtype == torch.int64 and isinstance(other, int)  # others may wrap around
    if len(call.values) != 1 or not whole:
        return UNKNOWN
    name = _WITH_SCALARS[call.target]
    return compare(getattr(aten, name).Tensor, difference.left, difference.right + cast(int, other))


def _view(call: _Call, band: Band) -> Value:
    """Operators that only show a band otherwise: its last two axes stay."""
    target, args = call.target, call.args
    queries, keys = band.shape[-2:]
    if target in (aten.alias.default, aten.detach.default):
        return band
    if target is aten.unsqueeze.default:
        axis = args[1] if args[1] >= 0 else args[1] + len(band.shape) + 1
        return band.map(lambda e: e.unsqueeze(axis)) if axis <= len(band.shape) - 2 else UNKNOWN
    if target is aten.slice.Tensor:
        axis, start, end, step = cast(Sequence[Any], (*args, *(0, None, None, 1)[len(args) - 1 :])[1:])
        size = band.shape[int(axis)]
        return band if (start or 0) == 0 and (end is None or end >= size) and step == 1 else UNKNOWN
    sizes = list(args[1])
    if len(sizes) < 2 or sizes[-2] not in (-1, queries) or sizes[-1] not in (-1, keys):
        return UNKNOWN
    if target is aten.expand.default:
        return band.map(lambda e: e.expand(*sizes[:-1], 1))
    return band.map(lambda e: e.reshape(*sizes[:-2], queries, 1))


def _combined(call: _Call) -> Value:
    """A pointwise operator on bands and on tensors of one value: it is run on their values. Two bands of other edges make one
    where outside of either the result is the same: where both are."""
    bands: list[Band] = [v for v in call.values if isinstance(v, Band)]
    others = [v for v in call.values if isinstance(v, torch.Tensor)]
    if len(bands) + len(others) != len(call.values) or not all(map(_is_uniform, others)):
        return UNKNOWN
    if len(bands) > 2 or len({b.keys for b in bands}) > 1:
        return UNKNOWN
    shape = _broadcast(*call.values)
    if shape[-2:] != bands[0].shape[-2:]:
        return UNKNOWN

    def at(sides: Sequence[bool]) -> torch.Tensor:
        side = iter(sides)
        one = [(v.inside if next(side) else v.outside) if isinstance(v, Band) else _one(v) for v in call.values]
        made: torch.Tensor = call.on(one)
        return made.reshape(1)

    lo, hi = bands[0].lo, bands[0].hi
    if len(bands) == 1 or bands[0].has_edges_of(bands[1]):
        inside, outside = at([True] * len(bands)), at([False] * len(bands))
    else:
        inside, outside, *mixed = (at(s) for s in ((True, True), (False, False), (True, False), (False, True)))
        if not all(_same(outside, m) for m in mixed):
            return UNKNOWN
        lo, hi = torch.maximum(lo, bands[1].lo), torch.minimum(hi, bands[1].hi)
    if _same(inside, outside):
        return inside.reshape(()).expand(shape)
    return Band(lo, hi, bands[0].keys, inside, outside).map(lambda e: e.expand(*shape[:-1], 1))


def _one(t: torch.Tensor) -> torch.Tensor:
    """One element of a tensor of equal ones, still a tensor of axes if it had any: types are promoted by that."""
    return t if t.dim() == 0 else t.flatten()[:1]

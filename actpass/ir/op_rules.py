"""What is known of operators: one table, a row an operator, which every analysis reads.

`rule` looks a row up and completes it by what torch says itself: its tag for pointwise operators, and its partitioner's tables
of views and of what may run again. An operator without a row is taken for one that can do anything: nonlinear, never run again
by choice, a kernel of its own that reads memory. ``tests/test_op_rules.py`` proves every field of every row on numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from actpass.errors import RegistryError
from actpass.registry import Registry
from actpass.torch_compat import OpOverload, get_default_op_list, inductor_prims

aten = torch.ops.aten
prims = torch.ops.prims

Moves = Literal["copy", "reshape", "permute", "join"]
Domain = Literal["keeps_zero", "offset", "clamps", "unbounded", "step"]


@dataclass(frozen=True, slots=True)
class Matmul:
    """factors: positions of the two. addend: of what is added to the product. batched: whether both have a batch. grouped:
    whether rows are sorted by expert, and an argument says where each expert ends."""

    factors: tuple[int, int] = (0, 1)
    addend: int | None = None
    batched: bool = False
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused attention: the positions of q, k and v, and in a backward that of the logsumexp of their scores."""

    query: int
    key: int
    value: int
    logsumexp: int | None = None

    @property
    def is_backward(self) -> bool:
        return self.logsumexp is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """What an operator is known to do. Positions are those of its arguments.

    known: whether the table or torch says anything of it.
    view: it shows the storage of its first argument. pieces: as a list.
    cast: it changes the dtype alone.
    pointwise: an element of the result depends on one element of each argument.
    reduction: it reduces axes to one number each (or to that and its place).
    moves: the numbers are those of its arguments: as they are ("copy"), in other axes but the same order ("reshape"), with axes
    exchanged ("permute"), beside those of another or beside padding ("join").
    linear: groups of positions: it is linear in each group's arguments together, and so multilinear in all groups. Of others,
    and where there is no group, nothing is known; integers have no degree.
    domain: a zero stays one ("keeps_zero"), gets a number added ("offset"), or an error grows by no more than its size
    ("clamps"); a value or slope has no bound at a finite point ("unbounded"); piecewise constant ("step").
    divisor: the position of what it divides by.
    bounded: the -inf of a mask becomes an ordinary number.
    exponential: it grows as an exponential does.
    chooses: a mask says which of its arguments each element is of.
    fill: the position of the number that all of the result is.
    axis: the position of the axis along which it works. best: it looks for the best along that; others go to places.
    writes: it writes values at places: positions of what is written to and of the values.
    reruns: pointwise, or moving: a second run in the backward is a loop and gives the same. recomputable: by the table of
    torch's partitioner.
    realised: how Inductor compiles what is neither pointwise nor a reduction: a "loop", or a loop over values that are added
    at indices ("scatter"); a loop that a CPU never computes twice ("heavy"); or one that no other computes for itself, unless
    both are fused ("buffer").
    told_as: what the report calls a result of it.
    """

    known: bool = True
    view: bool = False
    pieces: bool = False
    cast: bool = False
    pointwise: bool = False
    reduction: bool = False
    moves: Moves | None = None
    linear: tuple[tuple[int, ...], ...] = ()
    domain: Domain | None = None
    divisor: int | None = None
    bounded: bool = False
    exponential: bool = False
    chooses: bool = False
    fill: int | None = None
    axis: int | None = None
    best: bool = False
    writes: tuple[int, int] | None = None
    reruns: bool = False
    recomputable: bool = False
    realised: Literal["loop", "scatter", "heavy", "buffer"] | None = None
    told_as: Literal["residual stream", "statistics"] | None = None
    matmul: Matmul | None = None
    attention: Attention | None = None


UNKNOWN = OpRule(known=False)
_FIRST, _SUM, _PRODUCT = ((0,),), ((0, 1),), ((0,), (1,))
_SUMS, _STREAM, _STATISTICS = OpRule(linear=_FIRST, reduction=True), "residual stream", "statistics"
_RESHAPE, _PERMUTE = OpRule(moves="reshape"), OpRule(moves="permute")
_JOIN, _LOOP, _BEST = OpRule(moves="join", realised="loop", reruns=True), OpRule(realised="loop"), OpRule(axis=1, best=True)


def _rows(rule: OpRule, *operators: Any) -> Mapping[Any, OpRule]:
    return dict.fromkeys(operators, rule)


_TABLE: dict[Any, OpRule] = {
    # views, copies and casts
    **_rows(_RESHAPE, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
    **_rows(_RESHAPE, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    **_rows(_PERMUTE, aten.permute.default, aten.t.default, aten.transpose.int),
    **_rows(OpRule(view=True, pieces=True), aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
    **_rows(OpRule(cast=True, linear=_FIRST), prims.convert_element_type.default, aten._to_copy.default),
    aten.alias.default: OpRule(moves="copy"),
    aten.clone.default: OpRule(moves="copy", pointwise=True, linear=_FIRST, domain="keeps_zero"),
    aten.cat.default: replace(_JOIN, linear=_FIRST),
    aten.constant_pad_nd.default: replace(_JOIN, linear=_FIRST),
    aten.slice_scatter.default: replace(_JOIN, linear=_SUM),
    aten.select_scatter.default: replace(_JOIN, linear=_SUM, reruns=False),
    # sums and products
    aten.add.Tensor: OpRule(linear=_SUM, told_as=_STREAM),
    aten.sub.Tensor: OpRule(linear=_SUM, domain="clamps"),
    aten.add.Scalar: OpRule(domain="offset", told_as=_STREAM),
    **_rows(OpRule(linear=_FIRST, domain="keeps_zero"), aten.neg.default, aten.mul.Scalar),
    aten.mul.Tensor: OpRule(linear=_PRODUCT, domain="keeps_zero"),
    aten.div.Scalar: OpRule(linear=_FIRST),
    aten.div.Tensor: OpRule(linear=_FIRST, divisor=1),
    **_rows(OpRule(linear=_PRODUCT), aten.dot.default, aten.mv.default),
    aten.mm.default: OpRule(linear=_PRODUCT, matmul=Matmul()),
    aten.bmm.default: OpRule(linear=_PRODUCT, matmul=Matmul(batched=True)),
    aten.addmm.default: OpRule(matmul=Matmul((1, 2), addend=0)),
    aten.baddbmm.default: OpRule(matmul=Matmul((1, 2), addend=0, batched=True)),
    aten._scaled_mm.default: OpRule(linear=_PRODUCT, matmul=Matmul()),
    # functions of one number
    aten.exp.default: OpRule(exponential=True, bounded=True, realised="heavy"),
    **_rows(OpRule(exponential=True), aten.exp2.default, aten.expm1.default, aten.cosh.default, aten.sinh.default),
    aten.pow.Scalar: OpRule(exponential=True),
    **_rows(OpRule(bounded=True, realised="heavy"), aten.sigmoid.default, aten.tanh.default),
    **_rows(OpRule(domain="keeps_zero"), aten.abs.default, aten.pow.Tensor_Scalar),
    aten.log.default: OpRule(domain="unbounded", realised="heavy", told_as=_STATISTICS),
    aten.rsqrt.default: OpRule(domain="unbounded", told_as=_STATISTICS),
    **_rows(OpRule(domain="unbounded", realised="heavy"), aten.log2.default, aten.log10.default, aten.log1p.default),
    **_rows(OpRule(domain="unbounded"), aten.reciprocal.default, aten.sqrt.default, aten.asin.default, aten.acos.default),
    **_rows(OpRule(domain="unbounded"), aten.atanh.default, aten.acosh.default, aten.erfinv.default, aten.tan.default),
    **_rows(OpRule(domain="unbounded"), aten.lgamma.default, aten.digamma.default),
    **_rows(OpRule(domain="clamps"), aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    **_rows(OpRule(domain="clamps"), aten.relu.default, aten.maximum.default, aten.minimum.default),
    **_rows(OpRule(domain="step"), aten.eq.Tensor, aten.ne.Tensor),
    **_rows(OpRule(domain="step"), aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default),
    # choices
    aten.where.self: OpRule(linear=((1, 2),), chooses=True, realised="loop"),
    **_rows(OpRule(chooses=True), aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    # reductions
    **_rows(_SUMS, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, prims.sum.default),
    **_rows(OpRule(reduction=True), aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
    **_rows(OpRule(reduction=True), prims.amax.default, prims.amin.default, prims.prod.default, prims.var.default),
    **_rows(OpRule(reduction=True), aten.prod.default, aten.prod.dim_int, aten.any.default, aten.any.dim, aten.any.dims),
    **_rows(OpRule(reduction=True), aten.var.correction, aten.std.correction, aten.var_mean.correction),
    **_rows(OpRule(reduction=True), aten.logsumexp.default, aten.linalg_vector_norm.default),
    **_rows(OpRule(reduction=True, axis=1, best=True), aten.max.dim, aten.min.dim),
    **_rows(_BEST, aten.argmax.default, aten.argmin.default),
    aten.topk.default: OpRule(axis=2, best=True),
    aten.cumsum.default: OpRule(told_as=_STATISTICS),
    # places
    aten.embedding.default: OpRule(realised="loop", told_as=_STREAM),
    aten.embedding_dense_backward.default: OpRule(linear=_FIRST),
    aten.index.Tensor: OpRule(linear=_FIRST, realised="loop"),
    aten.gather.default: OpRule(linear=_FIRST, axis=1, realised="loop"),
    aten.scatter.value: OpRule(axis=1),
    **_rows(OpRule(axis=1, writes=(0, 3), linear=((0, 3),)), aten.scatter.src, aten.scatter_add.default),
    aten.index_add.default: OpRule(writes=(0, 3), linear=((0, 3),)),
    **_rows(
        OpRule(writes=(0, 2), linear=((0, 2),), realised="scatter"), aten.index_put.default, aten._unsafe_index_put.default
    ),
    aten._unsafe_masked_index_put_accumulate.default: OpRule(writes=(0, 3), linear=((0, 3),), realised="scatter"),
    # numbers from nothing
    aten.full.default: OpRule(fill=1, realised="loop"),
    aten.scalar_tensor.default: OpRule(fill=0, realised="loop"),
    **_rows(_LOOP, aten.full_like.default, aten.empty.memory_format, aten.arange.start_step, prims.iota.default),
    aten.copy.default: _LOOP,
    **_rows(_LOOP, inductor_prims.lookup_seed, inductor_prims.randint),
    inductor_prims.random: OpRule(realised="buffer"),
}


def _overloads(names: Iterable[str]) -> list[Any]:
    """torch's own operators of these names, as far as this version has them."""
    packets = (getattr(aten, name, None) for name in names)
    return [packet.default for packet in packets if packet is not None]


def _attention(operator: Any) -> OpRule:
    """The row of a fused attention, by the names of its arguments. In a backward v and out enter as dS = P * (dO v^T -
    rowsum(dO * out)) only, and dO, the first argument, enters linearly."""
    places = {a.name: i for i, a in enumerate(operator._schema.arguments)}
    query, key, value = (places[n] for n in ("query", "key", "value"))
    if "out" not in places:
        return OpRule(attention=Attention(query, key, value))
    return OpRule(linear=((0,), (value, places["out"])), attention=Attention(query, key, value, logsumexp=places["logsumexp"]))


_SCALED = tuple(
    f"_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)
_UNSCALED = ("_flash_attention", "_efficient_attention", "_cudnn_attention")
_FUSED = (*_SCALED, *(f"{n}_backward" for n in _SCALED), *(f"{n}_{way}" for n in _UNSCALED for way in ("forward", "backward")))
_TABLE.update((operator, _attention(operator)) for operator in _overloads(_FUSED))
_TABLE.update((operator, OpRule(matmul=Matmul(grouped=True))) for operator in _overloads(["_grouped_mm"]))
_TABLE[torch.ops.higher_order.flex_attention] = OpRule(attention=Attention(0, 1, 2))
_TABLE[torch.ops.higher_order.flex_attention_backward] = OpRule(attention=Attention(0, 1, 2, logsumexp=4))

RULES: Mapping[Any, OpRule] = _TABLE
"""Operator -> its row, as it is written here. Analyses ask `rule`."""
OP_RULES: Registry[OpRule] = Registry("operator rule", "actpass.op_rules")
"""Rows of other packages' operators, by the operator's name: ``"mylib.gelu.default"``."""
_OP_TYPES = get_default_op_list()


def register_op_rule(operator: OpOverload[..., Any], row: OpRule, module: str) -> None:
    """Say what is known of an ``operator`` that is not torch's own: it is then read by its ``row``, and what it reads or makes
    may be stored in another form. What a row claims must hold: a wrong one makes wrong gradients. module: the one that says so,
    ``__name__``, whose package is part of the compile cache's key. Raises `RegistryError` for an operator that is torch's own
    or has a row."""
    if operator.namespace in _TORCH_NAMESPACES:
        raise RegistryError(f"{operator} is torch's own: its row stands in actpass/ir/op_rules.py.")
    OP_RULES.register(str(operator), row, module)


def rule(operator: object) -> OpRule:
    """What is known of ``operator``: its row, and what torch says of it."""
    return _foreign_rule(operator) if _is_foreign(operator) else _own_rule(operator)


_TORCH_NAMESPACES = ("aten", "prims", "prim")


@functools.cache
def _is_foreign(operator: object) -> bool:
    return isinstance(operator, OpOverload) and operator.namespace not in _TORCH_NAMESPACES


@functools.cache
def _own_rule(operator: object) -> OpRule:
    return _completed(operator, RULES.get(operator, UNKNOWN))


def _foreign_rule(operator: object) -> OpRule:
    """Looked up each time: packages register rows whenever they are imported."""
    return _completed(operator, RULES.get(operator) or OP_RULES.get(str(operator)) or UNKNOWN)


@functools.cache
def _completed(operator: object, row: OpRule) -> OpRule:
    packet = getattr(operator, "overloadpacket", operator)
    tagged = torch.Tag.pointwise in getattr(operator, "tags", ())
    view = row.view or packet in _OP_TYPES.view_ops
    pointwise = tagged or view or row.cast or row.pointwise
    own = isinstance(operator, OpOverload) and operator.namespace == "aten"
    is_linalg = own and str(packet).startswith(("aten.linalg_", "aten._linalg"))
    return replace(
        row,
        known=row.known or pointwise or is_linalg,
        view=view,
        pointwise=pointwise,
        domain="unbounded" if is_linalg else row.domain,
        reruns=(row.reruns or pointwise) and not row.exponential,
        recomputable=packet in _OP_TYPES.recomputable_ops,
    )

"""Every field of every row of the table of operators, proved on numbers: what a row claims says what is checked."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.partitioners import get_default_op_list
from torch._inductor import inductor_prims
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import actpass
from actpass.ir.op_cost import attention_flops, matmul_flops
from actpass.ir.op_rules import RULES, UNKNOWN, OpRule, rule

aten = torch.ops.aten
prims = torch.ops.prims
Sample = list[Any]
INFINITE = 1e8


def _x(*shape: int, seed: int = 0) -> Tensor:
    """Distinct numbers between 0.1 and 0.9, others for another seed."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + count))
    return ((order + 0.37 + 0.01 * seed) / count * 0.8 + 0.1).to(torch.float64).reshape(shape)


def _codes(rows: int, columns: int) -> Tensor:
    return _x(rows, columns).float().to(torch.float8_e4m3fn)


ONE = torch.tensor(1.0)
X, Y, ROW, MASK = _x(2, 3), _x(2, 3, seed=1), _x(3, seed=2), torch.tensor([[True, False, True], [False, False, True]])
PLACES, LABELS = torch.tensor([[2, 0], [1, 2]]), torch.tensor([2, 0])
Q, K, V = _x(1, 2, 3, 4), _x(1, 2, 5, 4, seed=1), _x(1, 2, 5, 4, seed=2)
FLASH, FLASH_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def _of_flash() -> Sample:
    out, logsumexp = FLASH(Q, K, V)
    return [_x(*out.shape, seed=3), Q, K, V, out, logsumexp, 0.0, False]


SAMPLES: dict[Any, Sample] = {
    aten.view.default: [X, [3, 2]],
    aten._unsafe_view.default: [X, [3, 2]],
    aten.reshape.default: [X, [3, 2]],
    aten.unsqueeze.default: [X, 1],
    aten.squeeze.default: [_x(2, 1, 3)],
    aten.squeeze.dim: [_x(2, 1, 3), 1],
    aten.squeeze.dims: [_x(2, 1, 3), [1]],
    aten.permute.default: [_x(2, 3, 4), [2, 0, 1]],
    aten.t.default: [X],
    aten.transpose.int: [_x(2, 3, 4), 0, 2],
    aten.split.Tensor: [X, 2, 1],
    aten.split_with_sizes.default: [X, [1, 2], 1],
    aten.unbind.int: [X],
    aten.expand.default: [_x(2, 1), [2, 3]],
    aten.as_strided.default: [X, [2, 2], [3, 1]],
    aten.select.int: [X, 1, 2],
    aten.slice.Tensor: [X, 1, 1, 3],
    prims.broadcast_in_dim.default: [ROW, [2, 3], [1]],
    prims.convert_element_type.default: [X.round(decimals=1) * 5, torch.float32],
    aten._to_copy.default: [X.round(decimals=1) * 5],
    aten.alias.default: [X],
    aten.clone.default: [X],
    aten.cat.default: [[X, Y], 1],
    aten.constant_pad_nd.default: [X, [1, 2]],
    aten.slice_scatter.default: [X, Y[:, :2], 1, 1, 3],
    aten.select_scatter.default: [X, Y[:, 0], 1, 1],
    aten.add.Scalar: [X, 2.0],
    aten.mul.Scalar: [X, 3.0],
    aten.div.Scalar: [X, 3.0],
    aten.dot.default: [ROW, Y[0]],
    aten.mv.default: [X, ROW],
    aten.mm.default: [X, _x(3, 4)],
    aten.bmm.default: [_x(2, 3, 4), _x(2, 4, 5)],
    aten.addmm.default: [_x(2, 4, seed=4), X, _x(3, 4)],
    aten.baddbmm.default: [_x(2, 3, 5, seed=4), _x(2, 3, 4), _x(2, 4, 5)],
    aten._scaled_mm.default: [_codes(16, 32), _codes(48, 32).t(), ONE, ONE, None, None, torch.float32],
    aten.pow.Scalar: [2.0, X],
    aten.pow.Tensor_Scalar: [X, 2.0],
    aten.acosh.default: [X + 1],
    aten.clamp.default: [X, 0.3, 0.6],
    aten.clamp_min.default: [X, 0.3],
    aten.clamp_max.default: [X, 0.6],
    aten.where.self: [MASK, X, Y],
    aten.masked_fill.Scalar: [X, MASK, 7.0],
    aten.masked_fill.Tensor: [X, MASK, torch.tensor(7.0, dtype=torch.float64)],
    aten.sum.dim_IntList: [X, [1]],
    aten.mean.dim: [X, [1]],
    aten.amax.default: [X, [1]],
    aten.amin.default: [X, [1]],
    aten.prod.dim_int: [X, 1],
    aten.any.default: [MASK],
    aten.any.dim: [MASK, 1],
    aten.any.dims: [MASK, [1]],
    aten.var.correction: [X, [1]],
    aten.std.correction: [X, [1]],
    aten.var_mean.correction: [X, [1]],
    aten.logsumexp.default: [X, [1]],
    aten.linalg_vector_norm.default: [X, 2, [1]],
    aten.max.dim: [X, 1],
    aten.min.dim: [X, 1],
    prims.sum.default: [X, [1]],
    prims.amax.default: [X, [1]],
    prims.amin.default: [X, [1]],
    prims.prod.default: [X, [1]],
    prims.var.default: [X, [1], 1.0],
    aten.argmax.default: [X, 1],
    aten.argmin.default: [X, 1],
    aten.topk.default: [X, 2, 1],
    aten.cumsum.default: [X, 1],
    aten.embedding.default: [_x(4, 3), LABELS],
    aten.embedding_dense_backward.default: [X, LABELS, 4, -1, False],
    aten.index.Tensor: [_x(4, 3), [LABELS]],
    aten.gather.default: [X, 1, PLACES],
    aten.scatter.value: [X, 1, PLACES, 7.0],
    aten.scatter.src: [X, 1, PLACES, _x(2, 2, seed=5)],
    aten.scatter_add.default: [X, 1, PLACES, _x(2, 2, seed=5)],
    aten.index_add.default: [_x(4, 3), 0, LABELS, Y],
    aten.index_put.default: [_x(4, 3), [LABELS], Y],
    aten._unsafe_index_put.default: [_x(4, 3), [LABELS], Y],
    aten._unsafe_masked_index_put_accumulate.default: [_x(4, 3), torch.tensor([[True], [False]]), [LABELS], Y],
    aten.full.default: [[2, 3], 5.0],
    aten.full_like.default: [X, 5.0],
    aten.copy.default: [X, Y],
    aten.scalar_tensor.default: [5.0],
    aten.empty.memory_format: [[2, 3]],
    aten.arange.start_step: [0, 6, 2],
    inductor_prims.lookup_seed: [torch.tensor([3, 5]), 1],
    inductor_prims.random: [[2, 3], torch.tensor(5), "rand"],
    inductor_prims.randint: [0, 3, [2, 3], torch.tensor(5)],
    FLASH: [Q, K, V],
    FLASH_BACKWARD: _of_flash(),
}
KEYWORDS: dict[Any, dict[str, Any]] = {
    aten._to_copy.default: {"dtype": torch.float32},
    prims.iota.default: {"start": 0, "step": 1, "dtype": torch.int64, "device": torch.device("cpu"), "requires_grad": False},
}
SAMPLES[prims.iota.default] = [4]
WITH_ONE = (
    "abs acos argmax asin atanh ceil cosh digamma erfinv exp exp2 expm1 floor lgamma log log10 log1p log2 max mean min neg "
    "prod reciprocal relu round rsqrt sigmoid sinh sqrt sum tan tanh trunc"
)
WITH_TWO = "add.Tensor sub.Tensor mul.Tensor div.Tensor eq.Tensor ne.Tensor maximum.default minimum.default"
SAMPLES = {getattr(aten, name).default: [X] for name in WITH_ONE.split()} | SAMPLES
SAMPLES |= {getattr(getattr(aten, n), o): [X, Y] for n, _, o in (name.partition(".") for name in WITH_TWO.split())}

ELSEWHERE = {op for op, row in RULES.items() if row.attention and op not in SAMPLES}
"""Fused attention that no CPU has: by the names of its arguments."""
GROUPED = {op for op, row in RULES.items() if row.matmul and row.matmul.grouped}
SAMPLES |= {op: [_x(8, 16).bfloat16(), _x(2, 16, 8).bfloat16(), torch.tensor([4, 8], dtype=torch.int32)] for op in GROUPED}


def run(operator: Any, args: Sample) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operator(*args, **KEYWORDS.get(operator, {}))


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def floats(tree: Any) -> list[Tensor]:
    return [t for t in tensors(tree) if t.is_floating_point()]


def first(operator: Any, args: Sample) -> Tensor:
    return tensors(run(operator, args))[0]


def with_first(operator: Any, args: Sample, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The result with the first tensor of floating point changed."""
    place = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
    return first(operator, [change(a) if i == place else a for i, a in enumerate(args)])


def changed(args: Sample, places: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Sample:
    def of(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return [pytree.tree_map(of, a) if i in places else a for i, a in enumerate(args)]


def shows_the_first_argument(operator: Any, row: OpRule, args: Sample) -> None:
    for result in tensors(run(operator, args)):
        assert result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def is_a_list(operator: Any, row: OpRule, args: Sample) -> None:
    assert row.view
    assert len(run(operator, args)) > 1


def changes_the_dtype_alone(operator: Any, row: OpRule, args: Sample) -> None:
    result = run(operator, args)
    assert result.dtype is not args[0].dtype
    torch.testing.assert_close(result.double(), args[0], rtol=torch.finfo(result.dtype).eps, atol=0)


def reads_one_element(operator: Any, row: OpRule, args: Sample) -> None:
    want = tensors(run(operator, args))
    for place, argument in ((i, a) for i, a in enumerate(args) if isinstance(a, Tensor)):
        reads = [torch.zeros(w.shape, dtype=torch.int64) for w in want]
        for element in range(argument.numel()):
            other = argument.contiguous().clone()
            flat = other.view(-1)
            flat[element] = ~flat[element] if other.dtype is torch.bool else flat[element] * 0.5 + 0.05
            found = tensors(run(operator, [other if i == place else a for i, a in enumerate(args)]))
            for read, w, f in zip(reads, want, found, strict=True):
                read += w != f
        assert all(read.max() <= 1 for read in reads)


def reduces(operator: Any, row: OpRule, args: Sample) -> None:
    result = first(operator, args)
    assert result.numel() < args[0].numel()
    assert result.shape == () or result.shape == args[0].shape[:-1]
    torch.testing.assert_close(first(operator, [args[0].flip(-1), *args[1:]]), result)


def moves(operator: Any, row: OpRule, args: Sample) -> None:
    result = run(operator, args)
    if row.moves == "join":
        known = torch.cat([t.flatten() for t in floats(args)])
        values, counts = result.unique(return_counts=True)
        assert set(values.tolist()) - {0.0} <= set(known.tolist())
        assert counts[values != 0].max() == 1
        added = floats(args)[-1]
        assert set(added.flatten().tolist()) <= set(values.tolist())
        return
    same = {
        "copy": result.shape == args[0].shape,
        "reshape": True,
        "permute": sorted(result.shape) == sorted(args[0].shape) and result.shape != args[0].shape,
    }
    assert row.moves is not None
    assert same[row.moves]
    in_order = [t.flatten() if row.moves != "permute" else t.flatten().sort().values for t in (result, args[0])]
    assert torch.equal(*in_order)


def is_linear_in_each_group(operator: Any, row: OpRule, args: Sample) -> None:
    if operator is aten._scaled_mm.default:  # of codes, of which no sum is one: it is their product
        multiplies(operator, row, args)
        return
    for group in row.linear:
        a, b = (0.25, 0.75) if row.attention and group != (0,) else (2.0, -3.0)  # of dv, v and out are no part
        other = changed(args, group, lambda t: t.flip(0) * 0.3 + 0.2)
        both = [(o, n) for o, n in zip(pytree.tree_leaves(args), pytree.tree_leaves(other), strict=True)]
        leaves, spec = pytree.tree_flatten(args)
        mixed = [a * o + b * n if isinstance(o, Tensor) and o is not n else o for o, n in both]
        assert len(leaves) == len(mixed)
        assert any(isinstance(o, Tensor) and o is not n for o, n in both)
        found = tensors(run(operator, pytree.tree_unflatten(mixed, spec)))
        for f, x, y in zip(found, tensors(run(operator, args)), tensors(run(operator, other)), strict=True):
            tolerance = 1e-5 if f.dtype is torch.float32 else 1e-12
            torch.testing.assert_close(f, (a * x.double() + b * y.double()).to(f.dtype), rtol=tolerance, atol=tolerance)
    assert not any(set(g) & set(h) for g, h in itertools.combinations(row.linear, 2))


def slope(operator: Any, args: Sample, at: float) -> list[float]:
    """The value and the derivative at a number."""
    x = torch.full((2, 3), at, dtype=torch.float64, requires_grad=True)
    y = first(operator, [x, *args[1:]])
    y.sum().backward()
    assert x.grad is not None
    return [y.detach().flatten()[0].item(), x.grad.flatten()[0].item()]


def is_near_a_zero(operator: Any, row: OpRule, args: Sample) -> None:
    if row.domain == "keeps_zero":
        assert not with_first(operator, args, torch.zeros_like).any()
    elif row.domain == "offset":
        torch.testing.assert_close(with_first(operator, args, torch.zeros_like), first(operator, args) - args[0])
    elif row.domain == "clamps":
        other = args[0].flip(0) - 0.2
        grown = (first(operator, [other, *args[1:]]) - first(operator, args)).abs()
        assert (grown <= (other - args[0]).abs() + 1e-12).all()
        assert grown.any()
    elif row.domain == "step":
        assert torch.equal(with_first(operator, args, lambda x: x + 1e-9), first(operator, args))
        assert any(not torch.equal(with_first(operator, args, lambda _, y=y: y), first(operator, args)) for y in (X + 1, Y))
    elif operator is not aten.linalg_vector_norm.default:  # its gradient at zero is one of those that there are
        found = [number for at in (-1.0, 0.0, 1.0, math.pi / 2) for number in slope(operator, args, at)]
        assert any(not math.isfinite(n) or abs(n) > INFINITE for n in found)


def divides(operator: Any, row: OpRule, args: Sample) -> None:
    zeroed = [torch.zeros_like(a) if i == row.divisor else a for i, a in enumerate(args)]
    assert not run(operator, zeroed).isfinite().any()


def bounds_a_mask(operator: Any, row: OpRule, args: Sample) -> None:
    for masked in (-math.inf, -1e30):
        assert (with_first(operator, args, lambda x, m=masked: torch.full_like(x, m)).abs() <= 1).all()


def grows_exponentially(operator: Any, row: OpRule, args: Sample) -> None:
    once, twice = (with_first(operator, args, lambda x, n=n: torch.full_like(x, n)) for n in (150.0, 300.0))
    assert (twice > once * 2.0**100).all()
    assert not row.reruns


def chooses_by_its_mask(operator: Any, row: OpRule, args: Sample) -> None:
    (mask,) = (a for a in args if isinstance(a, Tensor) and a.dtype is torch.bool)
    one, other = (a for a in args if a is not mask)
    one, other = (other, one) if operator is not aten.where.self else (one, other)
    assert torch.equal(run(operator, args), torch.where(mask, one, other))


def fills(operator: Any, row: OpRule, args: Sample) -> None:
    for number in (0, 7.0):
        assert (run(operator, [number if i == row.fill else a for i, a in enumerate(args)]) == number).all()


def works_along_its_axis(operator: Any, row: OpRule, args: Sample) -> None:
    assert row.axis is not None
    assert args[row.axis] == 1
    turned = [a.t() if isinstance(a, Tensor) else a for a in args]
    turned[row.axis] = 0
    for result, of_turned in zip(tensors(run(operator, args)), tensors(run(operator, turned)), strict=True):
        assert torch.equal(result, of_turned.t())


def finds_the_best(operator: Any, row: OpRule, args: Sample) -> None:
    at = tensors(run(operator, args))[-1]
    assert at.dtype is torch.int64
    at = at[:, 0] if at.dim() == 2 else at
    found = args[0].gather(1, at[:, None])[:, 0]
    assert torch.equal(found, args[0].amax(1)) or torch.equal(found, args[0].amin(1))


def writes_values_at_places(operator: Any, row: OpRule, args: Sample) -> None:
    assert row.writes is not None
    base, values = row.writes
    result = run(operator, args)
    written = result != run(operator, [a + 100 if i == values else a for i, a in enumerate(args)])
    assert 0 < written.sum() <= args[values].numel()
    assert torch.equal(result[~written], args[base][~written])


def gives_the_same_again(operator: Any, row: OpRule, args: Sample) -> None:
    assert torch.Tag.nondeterministic_seeded not in operator.tags
    for a, b in zip(tensors(run(operator, args)), tensors(run(operator, args)), strict=True):
        assert a.shape == b.shape
        assert operator is aten.empty.memory_format or torch.equal(a, b)


def inductor_makes_a_loop_of_it(operator: Any, row: OpRule, args: Sample) -> None:
    from torch._inductor import decomposition, ir, lowering

    assert operator in lowering.lowerings or operator in decomposition.decompositions
    assert operator not in lowering.fallbacks
    if row.realised == "heavy":
        assert f'"{operator._opname}"' in inspect.getsource(ir.StorageBox.should_realize_on_reuse)
    if row.realised == "buffer":
        assert ".realize()" in inspect.getsource(lowering.lowerings[operator])
    if row.realised == "scatter":
        assert row.writes


def is_told_in_known_words(operator: Any, row: OpRule, args: Sample) -> None:
    assert row.told_as in ("residual stream", "statistics")
    assert row.matmul is row.attention is None


def node_of(operator: Any, args: Sample) -> Any:
    graph = make_fx(lambda *given: operator(*given), tracing_mode="fake")(*args).graph
    return next(n for n in graph.nodes if n.target is operator)


def counted(operator: Any, args: Sample) -> int:
    with FlopCounterMode(display=False) as counter:
        run(operator, args)
    return counter.get_total_flops()


def multiplies(operator: Any, row: OpRule, args: Sample) -> None:
    assert row.matmul is not None
    left, right = (args[i] for i in row.matmul.factors)
    if row.matmul.grouped:
        start, want = 0, []
        for stop, weight in zip(args[2].tolist(), right, strict=True):
            want.append(left[start:stop].float() @ weight.float())
            start = stop
        torch.testing.assert_close(run(operator, args).float(), torch.cat(want), rtol=2**-7, atol=2**-7)
        assert matmul_flops(node_of(operator, args)) == 2 * 8 * 16 * 8
        return
    want = left @ right if left.itemsize > 1 else left.float() @ right.float()
    if row.matmul.addend is not None:
        want = want + args[row.matmul.addend]
    torch.testing.assert_close(run(operator, args), want)
    assert (left.dim() == right.dim() == 3) == row.matmul.batched
    assert matmul_flops(node_of(operator, args)) == counted(operator, args)


def attends(operator: Any, row: OpRule, args: Sample) -> None:
    place = row.attention
    assert place is not None
    q, k, v = (args[i].clone().requires_grad_() for i in (place.query, place.key, place.value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    out = scores.softmax(-1) @ v
    results = tensors(run(operator, args))
    if place.logsumexp is None:
        torch.testing.assert_close(results[0], out)
        flops = 2
    else:
        want = torch.autograd.grad(out, (q, k, v), args[0])
        for found, gradient in zip(results, want, strict=True):
            torch.testing.assert_close(found, gradient)
        torch.testing.assert_close(args[place.logsumexp].double(), scores.logsumexp(-1))
        flops = 5
    assert attention_flops(node_of(operator, args)) == flops * 2 * scores.numel() * q.shape[-1]


CHECKS: dict[str, Callable[[Any, OpRule, Sample], None]] = {
    "view": shows_the_first_argument,
    "pieces": is_a_list,
    "cast": changes_the_dtype_alone,
    "pointwise": reads_one_element,
    "reduction": reduces,
    "moves": moves,
    "linear": is_linear_in_each_group,
    "domain": is_near_a_zero,
    "divisor": divides,
    "bounded": bounds_a_mask,
    "exponential": grows_exponentially,
    "chooses": chooses_by_its_mask,
    "fill": fills,
    "axis": works_along_its_axis,
    "best": finds_the_best,
    "writes": writes_values_at_places,
    "reruns": gives_the_same_again,
    "recomputable": gives_the_same_again,
    "realised": inductor_makes_a_loop_of_it,
    "told_as": is_told_in_known_words,
    "matmul": multiplies,
    "attention": attends,
}
CLAIMS = [
    pytest.param(operator, field, id=f"{operator}-{field}")
    for operator in dict.fromkeys((*RULES, *SAMPLES))
    if operator not in ELSEWHERE
    for field in (f.name for f in dataclasses.fields(OpRule))
    if field != "known" and getattr(rule(operator), field) != getattr(UNKNOWN, field)
]


@pytest.mark.parametrize(("operator", "field"), CLAIMS)
def test_a_row_claims_what_is_so(operator: Any, field: str):
    assert operator in SAMPLES, f"{operator} has a row and no sample of its arguments here"
    CHECKS[field](operator, rule(operator), SAMPLES[operator])


def test_every_field_is_checked():
    assert set(CHECKS) == {f.name for f in dataclasses.fields(OpRule)} - {"known"}


def test_every_view_that_torch_knows_is_checked():
    packets = {getattr(op, "overloadpacket", None) for op in SAMPLES}
    assert get_default_op_list().view_ops <= packets


@pytest.mark.parametrize("operator", sorted(ELSEWHERE, key=str), ids=str)
def test_attention_of_other_devices_is_known_by_the_names_of_its_arguments(operator: Any):
    schema = getattr(operator, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else list(inspect.signature(operator.__call__).parameters)
    row = rule(operator)
    assert row.attention is not None
    places = dataclasses.astuple(row.attention)
    assert [names[i] for i in places if i is not None] == ["query", "key", "value", "logsumexp"][
        : len(places) - places.count(None)
    ]
    assert row.attention.is_backward == ("out" in names)
    if schema and row.attention.is_backward:
        assert names[0].rstrip("_") == "grad_out"
        assert row.linear == ((0,), (names.index("value"), names.index("out")))


@pytest.mark.parametrize("operator", [prims.rev.default, aten._fft_c2c.default, aten.bernoulli.p, "a name"], ids=str)
def test_an_operator_without_a_row_is_taken_for_anything(operator: Any):
    assert dataclasses.replace(rule(operator), recomputable=False) == UNKNOWN


def test_what_torch_tags_as_pointwise_is_known():
    assert rule(aten.sin.default) == OpRule(pointwise=True, reruns=True, recomputable=True)


def test_factorizations_are_unbounded_by_their_name():
    assert rule(aten.linalg_inv_ex.default).domain == "unbounded"
    assert rule(aten._linalg_det.default).domain == "unbounded"
    assert aten.linalg_inv_ex(torch.zeros(2, 2))[1] > 0


class Sorted(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(64, 96), nn.Linear(96, 32), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x))).square().mean()


@pytest.mark.parametrize(
    ("between", "name"), [(lambda x: x.cummax(-1).values, "cummax"), (torch.sin, None)], ids=["cummax", "sin"]
)
def test_an_operator_without_a_row_is_told_where_it_is_in_the_way(between: Callable[[Tensor], Tensor], name: str | None):
    report = actpass.explain(Sorted(between), torch.randn(128, 64), options={"min_tensor_bytes": 0})
    notes = [note for note in report.regions[0].notes if "no rule for" in note]
    assert len(notes) == (name is not None)
    assert name is None or f"aten.{name}.default" in notes[0]

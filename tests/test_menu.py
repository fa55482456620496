"""Menus: plain numbers in, what could be stored how out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actpass.analysis.partitioned import PartitionConstraints
from actpass.codecs import QUANTIZERS
from actpass.options import TensorOptions
from actpass.passes.quantize_saved import layout_of
from actpass.plan import CodecSet, SavedTensor, choose_storage
from actpass.plan.knapsack import solve
from actpass.plan.plan import RECOMPUTE
from actpass.plan.sensitivity import Sensitivity
from actpass.plan.storage_options import Costs, bytes_in, storage_options
from actpass.planner.region import PartitionPlan
from actpass.planner.storage_search import Search

T, N = 64, 32
CODECS = CodecSet.of(QUANTIZERS)
WIDTHS = CODECS.offered
ATTENTION = ("flash",)


def tensor(node: str, **changes) -> SavedTensor:
    values = {
        "saved_for_backward": (node,),
        "base": node,
        "nbytes": 4 * T * N,
        "kinds": ("nonlinear",),
        "linear": False,
        "paths": (node,),
        "obstacle": None,
        "recompute": (f"{node}_mm",),
        "recompute_flops": 2 * T * N * N,
        "elements": T * N,
    }
    return SavedTensor(node=node, **{**values, **changes})


def stored(t: SavedTensor, codec: str, group: int | None) -> int:
    return t.elements * QUANTIZERS[codec].bits // 8 + 2 * (t.elements // (group or QUANTIZERS[codec].group))


def menus_of(
    tensors: list[SavedTensor], *, recompute: bool = True, tensor_options: TensorOptions | None = None, step_flops: int = 10**9
):
    costs = Costs(step_flops, sum(t.elements for t in tensors), CODECS)
    return storage_options(tensors, lambda _: tensor_options or TensorOptions(), stored, costs, recompute=recompute)


def search_of(tensors: list[SavedTensor], *, step_flops: int, inputs: int = 0) -> Search[Any]:
    """Over tensors alone: in place of what is run again crosses what it is made from, ``inputs`` bytes of no other form."""

    def crossing(constraints: PartitionConstraints) -> list[SavedTensor]:
        recompute = [t for t in tensors if set(t.recompute) & constraints.recompute]
        made_from = [tensor(f"{t.node}_in", nbytes=inputs, obstacle="a mask", recompute=()) for t in recompute if inputs]
        return [*(t for t in tensors if t not in recompute), *made_from]

    region = SimpleNamespace(
        config=SimpleNamespace(tensor_options_of_any=lambda _: TensorOptions()),
        cut=crossing,
        tensors=lambda cut: cut,
        sizes=lambda _: stored,
        costs=lambda cut, found: Costs(step_flops, sum(t.elements for t in found), CODECS),
    )
    free = PartitionConstraints(recompute_materialized=True)
    return Search(region, PartitionPlan(free, crossing(free), None))  # type: ignore[arg-type]


def attention() -> list[SavedTensor]:
    """q, k, v and the output of one fused attention."""
    q, k = (tensor(n, kinds=("nonlinear", "score"), attention="flash", role="score") for n in "qk")
    v = tensor("v", kinds=("linear",), attention="flash", role="value")
    return [q, k, v, tensor("out", kinds=("linear",), attention="flash", role="output", recompute=ATTENTION)]


def codec(error: float, *, in_budgets: bool = True, safe_for_scores: bool = False) -> Any:
    return SimpleNamespace(
        bits=8,
        error=error,
        in_budgets=in_budgets,
        safe_for_scores=safe_for_scores,
        safe_for_recomputed_scores=True,
    )


@pytest.mark.parametrize("other", [codec(1e-3), codec(0.1), codec(1e-6, safe_for_scores=True)])
def test_what_is_chosen_without_being_named_and_without_a_budget_is_not_another_packages(other: Any):
    """As its codec is offered to a budget, or safe for scores."""
    installed = CodecSet({**QUANTIZERS, "other": other}, foreign=CODECS.foreign | {"other"})
    for kind in ("score", "recomputed score"):
        assert installed.coarsest_safe_for(kind) == CODECS.coarsest_safe_for(kind)
        assert installed.made_safe("int2", (kind,)) == CODECS.made_safe("int2", (kind,))
    assert installed.own == CODECS.own == ("int16", "int8", "int4")
    assert "other" in installed.offered
    tensors = (tensor("x", nbytes=8 * T * N), tensor("w", kinds=("contraction",), nbytes=8 * T * N))
    assert decided(tensors, installed) == decided(tensors, CODECS) == ["int8", "int4"]


def decided(tensors: tuple[SavedTensor, ...], codecs: CodecSet) -> list[str]:
    def size(t: SavedTensor, codec: str, group: int | None) -> int:
        return t.elements * codecs.by_name[codec].bits // 8

    return [s.codec for s in choose_storage(tensors, lambda _: TensorOptions(), size, codecs)]


def test_a_policy_chooses_for_values_and_outputs_what_is_safe_and_a_user_may_name_another():
    value = tensor("v", attention="flash", role="value", nbytes=8 * T * N)
    assert set(CODECS.offered_for(value)) - CODECS.foreign == {"int16", "int8"}
    assert CODECS.made_safe("int4", value.kinds) == "int4"
    for codec in QUANTIZERS.values():
        if codec.safe_for_recomputed_scores:
            assert codec.error <= 1e-4


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_the_errors_are_those_of_a_gaussian_tensor(codec: str):
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    layout = layout_of(x, codec, None)
    assert layout is not None
    payload, scale = QUANTIZERS[codec].encode(x, layout.groups, None)
    y = QUANTIZERS[codec].decode(payload, scale, layout.groups, x.shape, x.dtype)
    error = float((y - x).square().sum() / x.square().sum())
    assert QUANTIZERS[codec].error / 2 < error < QUANTIZERS[codec].error * 2


def test_more_bytes_never_cost_more():
    for menu in menus_of([tensor("x"), *attention()]):
        assert [o.nbytes for o in menu.options] == sorted({o.nbytes for o in menu.options})
        assert [o.cost for o in menu.options] == sorted({o.cost for o in menu.options}, reverse=True)


def test_the_tensors_of_one_attention_are_on_one_menu():
    found = menus_of([tensor("x"), *attention()])
    assert [tuple(t.node for t in m.members) for m in found] == [("x",), ("q", "k", "v", "out")]


def test_queries_and_keys_take_16_bits_or_more_beside_the_exact_logsumexp():
    _, menu = menus_of([tensor("x"), *attention()])
    for forms, recompute in zip(menu.forms, menu.recompute, strict=True):
        if "flash" not in recompute:
            assert set(forms[:2]) <= {"save", "int16"}, forms
            assert set(forms[2:]) <= {"save", "int16", "int8", RECOMPUTE}, forms
            assert forms[3] != RECOMPUTE


def test_what_feeds_an_attention_is_run_again_only_with_it():
    _, menu = menus_of([tensor("x"), *attention()])
    assert any("q_mm" in recompute for recompute in menu.recompute)
    assert all("flash" in recompute for recompute in menu.recompute if "q_mm" in recompute or "k_mm" in recompute)
    assert menu.forms[0] == (RECOMPUTE,) * 4  # the fewest bytes


def test_queries_and_keys_may_take_16_bits_where_attention_is_run_again():
    stored_once = [replace(t, recompute=()) if t.role == "score" else t for t in attention()]
    costs = Costs(10**9, 5 * T * N, CODECS)
    (menu,) = storage_options(stored_once, lambda _: TensorOptions(), stored, costs, recompute=True, coarsest_codec="int16")
    assert not any({"int8", "int4"} & set(forms) for forms in menu.forms), menu.forms
    assert any(
        "flash" in recompute and forms[:2] == ("int16", "int16")
        for forms, recompute in zip(menu.forms, menu.recompute, strict=True)
    )


def test_nothing_is_run_again_where_it_must_not():
    for menu in menus_of([tensor("x"), *attention()], recompute=False):
        assert not any(menu.recompute)
    (menu,) = menus_of([tensor("x", recompute=(), recompute_flops=0)])
    assert all(forms != (RECOMPUTE,) for forms in menu.forms)


def test_a_form_that_was_asked_for_is_the_only_one():
    (menu,) = menus_of([tensor("x", recompute_flops=10**9)], tensor_options=TensorOptions(codec="int4"))
    assert set(menu.forms) == {("int4",), (RECOMPUTE,)}
    (menu,) = menus_of([tensor("x", recompute_flops=10**9)], tensor_options=TensorOptions(policy="exact"))
    assert set(menu.forms) == {("save",), (RECOMPUTE,)}


def test_a_tensor_that_weighs_more_in_the_gradient_keeps_more_bits():
    """Of two alike, at half of their bytes."""
    tensors = [tensor("a", recompute=()), tensor("b", recompute=())]
    costs = Costs(
        10**12, 2 * T * N, CODECS, {name: Sensitivity("", name, (), factor) for name, factor in (("a", 0.9), ("b", 1e-4))}
    )
    found = storage_options(tensors, lambda _: TensorOptions(), stored, costs, recompute=False)
    solution = solve([m.options for m in found], stored(tensors[0], "int8", None) + stored(tensors[1], "int4", None))
    assert solution is not None
    assert [m.forms[k] for m, k in zip(found, solution.chosen, strict=True)] == [("int8",), ("int4",)]


@pytest.mark.parametrize("first", ["x", "v"])
def test_what_must_cancel_in_the_gradient_of_a_score_is_exact_before_others(first: str):
    """Of two alike, at the bytes of one exact and one in 8 bits."""
    x = tensor("x", kinds=("linear",), recompute=())
    v = tensor("v", kinds=("linear",), recompute=(), attention="flash", role="value")
    tensors = [x, v] if first == "x" else [v, x]
    found = menus_of(tensors, recompute=False)
    solution = solve([m.options for m in found], x.nbytes + stored(x, "int8", None))
    assert solution is not None
    forms = {m.members[0].node: m.forms[k] for m, k in zip(found, solution.chosen, strict=True)}
    assert forms == {"x": ("int8",), "v": ("save",)}


def test_no_form_is_coarser_than_one_that_fits_everywhere():
    """Time speaks for fewer bits: they take fewer bytes to write and read."""
    tensors = [tensor(name, recompute=()) for name in "abcd"]
    search = search_of(tensors, step_flops=10**7)
    sizes = {w: bytes_in(w, tensors, lambda _: TensorOptions(), stored, CODECS) for w in WIDTHS}
    for width, nbytes in sizes.items():
        finer = {None, *WIDTHS[: WIDTHS.index(width) + 1]}
        for capacity in (nbytes, nbytes + 1, int(1.2 * nbytes)):
            found = search.at(capacity)
            assert found.stored <= capacity
            assert set((found.choice.codecs or {}).values()) <= finer, (width, capacity, found)
    assert "int8" in (search.at(sizes["int16"] - 1).choice.codecs or {}).values()


def test_where_running_again_frees_nothing_one_width_for_everything_is_found():
    tensors = [tensor(name, recompute_flops=1) for name in "abcd"]
    search = search_of(tensors, step_flops=10**7, inputs=tensors[0].nbytes)
    for width in WIDTHS:
        nbytes = bytes_in(width, tensors, lambda _: TensorOptions(), stored, CODECS)
        found = search.at(nbytes)
        assert found.stored <= nbytes
        assert set((found.choice.codecs or {}).values()) == {width}


def test_the_bytes_of_one_width_count_queries_and_keys_in_it():
    tensors = [tensor("x"), *attention()]
    for width in ("int16", "int8"):
        assert bytes_in(width, tensors, lambda _: TensorOptions(), stored, CODECS) == 5 * stored(tensors[0], width, None)
    assert bytes_in("int8", tensors, lambda _: TensorOptions(policy="exact"), stored, CODECS) == 5 * tensors[0].nbytes

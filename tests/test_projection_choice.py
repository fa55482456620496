"""Which projections are chosen, and the plan: plain numbers in, plain data out."""

from __future__ import annotations

import json

import pytest

from actpass.options import TensorOptions, options_for
from actpass.plan import Candidate, choose, noise, rank_sites
from actpass.plan.rank_allocation import RankSite


def candidate(**changes) -> Candidate:
    values = {
        "name": "x",
        "matmuls": ("mm",),
        "base": "x",
        "parameters": ("w",),
        "groups": 1,
        "tokens": 2048,
        "width": 512,
        "outs": (512,),
        "x_bytes": 2048 * 512 * 4,
        "element_size": 4,
        "frees": False,
    }
    return Candidate(**{**values, **changes})


def decide(c: Candidate, **changes):
    (decision,) = choose([c], lambda _: TensorOptions(**{"projection": "haar", **changes})).decisions
    return decision


def test_flops_through_the_factors_match_the_arithmetic_of_the_docs():
    c = candidate(outs=(512, 512, 512))
    t, n, m, r = 2048, 512, 512, 128
    assert c.flops == 3 * 2 * t * n * m
    assert c.flops_at(r) == 2 * t * n * r + 3 * (2 * t * m * r + 2 * m * n * r)


def test_a_choice_projects_where_it_saves_flops():
    decision = decide(candidate(outs=(512, 512, 512)))
    assert decision.projects
    assert decision.project_in == "backward"
    assert decision.extra_flops < 0


def test_a_choice_leaves_a_wide_input_of_a_narrow_output_exact_and_says_why():
    """down_proj: the projection of its input alone costs as much as the gradient."""
    decision = decide(candidate(width=1376, outs=(256,)))
    assert not decision.projects
    assert "would cost" in decision.reason
    assert "free no bytes" in decision.reason


def test_a_choice_projects_for_bytes_even_if_it_costs_flops():
    decision = decide(candidate(outs=(8,), frees=True))
    assert decision.project_in == "forward"
    assert decision.extra_flops > 0


def test_a_choice_obeys_when_asked_for_the_unprofitable():
    (decision,) = choose(
        [candidate(width=1376, outs=(256,))], lambda _: TensorOptions(projection="haar"), skip_unprofitable=False
    ).decisions
    assert decision.projects


def test_a_choice_rounds_rank_up_to_the_kernels_multiple_within_the_width():
    assert decide(candidate(rank_multiple=8), rank=9).rank == 16
    assert decide(candidate(width=12, frees=True, tokens=10**6, x_bytes=10**9, rank_multiple=8), rank=9).rank == 12


def test_plan_hash_is_stable_and_sees_every_field():
    plan = choose([candidate()], lambda _: TensorOptions(projection="haar"))
    again = choose([candidate()], lambda _: TensorOptions(projection="haar"))
    other = choose([candidate()], lambda _: TensorOptions(projection="haar", rank=0.5))
    assert plan.hash == again.hash != other.hash
    assert json.loads(json.dumps(plan.to_dict()))["schema_version"] == 7


@pytest.mark.parametrize("rank", [1, 0.001])
def test_a_choice_accepts_the_smallest_rank(rank):
    assert decide(candidate(), rank=rank).rank == 1


def ranked(*candidates: Candidate, tensor_options: TensorOptions | None = None, **more):
    request = tensor_options or TensorOptions(projection="haar", rank="budget")
    return rank_sites(candidates, lambda _: request, **more)


def stored(**changes) -> Candidate:
    """A tensor that is stored for its weight gradient alone."""
    return candidate(**{"frees": True, **changes})


def test_a_site_weighs_its_weights_elements_and_the_variance_of_its_method():
    whole = 512 * (512 + 256)
    c = stored(outs=(512, 256), matmuls=("a", "b"))
    for method, numerator in (("haar", 512), ("srht", 512), ("gaussian", 513), ("rademacher", 511)):
        assert ranked(c, tensor_options=TensorOptions(**options_for(method), rank="budget")) == {
            "a": RankSite(whole * numerator, 2048 * 4, 512)
        }


def test_a_site_costs_what_is_stored():
    (half,) = ranked(stored(element_size=2, groups=3, x_bytes=3 * 2048 * 512 * 2, rank_multiple=8)).values()
    assert (half.nbytes, half.most, half.multiple) == (3 * 2048 * 2, 512, 8)
    (coded,) = ranked(stored(), tensor_options=TensorOptions(projection="haar", rank="budget", codec="int4")).values()
    assert coded.nbytes == 2048 // 2 + 2 * 2048 // 32
    (broadcast,) = ranked(stored(x_bytes=2048 * 100 * 4)).values()
    assert broadcast.most == 100


def test_measured_weights_take_the_place_of_elements():
    a, b = stored(matmuls=("a",), parameters=("first",)), stored(matmuls=("b",), parameters=("second",), base="y")
    found = ranked(a, b, weights={"first": 3.0, "second": 1.0})
    assert found["a"].error == 3 * found["b"].error == 3 * 512
    assert noise(
        [a, b],
        lambda _: TensorOptions(projection="haar", rank="budget"),
        found,
        {"a": 128, "b": 512},
        {"first": 3.0, "second": 1.0},
    ) == (0.75 * (512 / 128 - 1))


def test_only_what_frees_bytes_takes_a_rank_from_the_budget():
    """Not what is rebuilt, not what other uses keep, and not x if another reader of it stays exact."""

    def request(paths: tuple[str, ...]) -> TensorOptions:
        return TensorOptions(policy="exact") if paths == ("exact",) else TensorOptions(projection="haar", rank="budget")

    candidates = [
        stored(matmuls=("a",), base="a"),
        candidate(matmuls=("b",), base="b", x_bytes=0),
        candidate(matmuls=("c",), base="c"),
        stored(matmuls=("d",), base="d"),
        stored(matmuls=("e",), base="d", parameters=("exact",)),
    ]
    sites = rank_sites(candidates, request)
    assert set(sites) == {"a"}
    decisions = choose(candidates, request, ranks={"a": 64}).decisions
    assert [d.rank for d in decisions] == [64, None, None, None, None]
    assert decisions[0].project_in == "forward"
    for d, says in zip(decisions[1:], ("not stored", "other uses", "another weight gradient", "as asked"), strict=True):
        assert says in d.reason


def test_without_a_limit_and_at_the_largest_rank_x_is_kept():
    for ranks in (None, {"mm": 512}):
        (decision,) = choose([stored()], lambda _: TensorOptions(projection="gaussian", rank="budget"), ranks=ranks).decisions
        assert decision.projection is None
        assert decision.reason == "within the budget as it is"
    assert (
        noise([stored()], lambda _: TensorOptions(projection="gaussian", rank="budget"), ranked(stored()), {"mm": 512}) == 0.0
    )

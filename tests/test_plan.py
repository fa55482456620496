"""The policy and the plan: plain numbers in, plain data out."""

from __future__ import annotations

import json

import pytest

from actpass.config import Treatment
from actpass.plan import Candidate, choose


def candidate(**changes) -> Candidate:
    values = {
        "name": "x",
        "matmuls": ("mm",),
        "root": "x",
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
    (decision,) = choose([c], lambda _: Treatment(**{"method": "haar", **changes})).decisions
    return decision


def test_flops_through_the_factors_match_the_arithmetic_of_the_docs():
    c = candidate(outs=(512, 512, 512))
    t, n, m, r = 2048, 512, 512, 128
    assert c.flops == 3 * 2 * t * n * m
    assert c.flops_at(r) == 2 * t * n * r + 3 * (2 * t * m * r + 2 * m * n * r)


def test_policy_projects_where_it_saves_flops():
    decision = decide(candidate(outs=(512, 512, 512)))
    assert decision.projects
    assert decision.project_in == "backward"
    assert decision.extra_flops < 0


def test_policy_leaves_a_wide_input_of_a_narrow_output_exact_and_says_why():
    """down_proj: the projection of its input alone costs as much as the gradient."""
    decision = decide(candidate(width=1376, outs=(256,)))
    assert not decision.projects
    assert "would cost" in decision.reason
    assert "free no bytes" in decision.reason


def test_policy_projects_for_bytes_even_if_it_costs_flops():
    decision = decide(candidate(outs=(8,), frees=True))
    assert decision.project_in == "forward"
    assert decision.extra_flops > 0


def test_policy_obeys_when_asked_for_the_unprofitable():
    (decision,) = choose([candidate(width=1376, outs=(256,))], lambda _: Treatment("haar"), profitable_only=False).decisions
    assert decision.projects


def test_policy_rounds_rank_up_to_the_kernels_multiple_within_the_width():
    assert decide(candidate(rank_multiple=8), rank=9).rank == 16
    assert decide(candidate(width=12, frees=True, tokens=10**6, x_bytes=10**9, rank_multiple=8), rank=9).rank == 12


def test_plan_hash_is_stable_and_sees_every_field():
    plan = choose([candidate()], lambda _: Treatment("haar"))
    again = choose([candidate()], lambda _: Treatment("haar"))
    other = choose([candidate()], lambda _: Treatment("haar", 0.5))
    assert plan.hash == again.hash != other.hash
    assert json.loads(json.dumps(plan.to_dict()))["schema_version"] == 3


@pytest.mark.parametrize("rank", [1, 0.001])
def test_policy_accepts_the_smallest_rank(rank):
    assert decide(candidate(), rank=rank).rank == 1

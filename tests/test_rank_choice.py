"""Ranks from a capacity of bytes: the closed form against its conditions, ranks on the grid against every choice there is."""

from __future__ import annotations

import doctest
import itertools
import math
import random
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actpass.plan.rank_allocation import RankSite, bytes_at, choose_ranks, continuous, error_at, least_bytes

from .helpers import in_processes

sites_of = st.builds(
    RankSite,
    st.floats(0.001, 1e6),
    st.integers(1, 5000),
    st.one_of(st.integers(1, 40), st.integers(1, 2000)),
    st.sampled_from([1, 1, 4, 8, 16]),
)
many = st.lists(sites_of, min_size=1, max_size=12)
small = st.lists(st.builds(RankSite, st.floats(0.01, 100), st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=3)
share = st.floats(0, 1)


def most_bytes(sites: list[RankSite]) -> int:
    return bytes_at(sites, [s.most for s in sites])


def between(sites: list[RankSite], part: float) -> int:
    """A capacity from the least that is possible to what all takes."""
    return least_bytes(sites) + int(part * (most_bytes(sites) - least_bytes(sites)))


def grid(site: RankSite) -> list[int]:
    found = [site.least]
    while (after := site.after(found[-1])) is not None:
        found.append(after)
    return found


def gain(site: RankSite, rank: int) -> float:
    """By how much the next step from ``rank`` reduces the error."""
    after = site.after(rank)
    return 0.0 if after is None else site.error / rank - site.error / after


@given(most=st.integers(1, 3000), multiple=st.sampled_from([1, 2, 4, 8, 16, 32, 128]))
def test_the_grid_is_what_matmuls_and_the_kernel_like(most: int, multiple: int):
    found = grid(RankSite(1.0, 1, most, multiple))
    assert found == sorted(set(found))
    assert found[-1] == most
    for rank in found[:-1]:
        assert rank % (64 if rank >= 256 else 16 if rank >= 64 else 8) == rank % multiple == 0
    assert all(b <= 2 * a for a, b in itertools.pairwise(found))  # what the start of the ascent relies on


@settings(max_examples=150, deadline=None)
@given(sites=many, part=share)
def test_the_closed_form_meets_the_conditions_of_the_best(sites: list[RankSite], part: float):
    """Karush, Kuhn, Tucker: the capacity is used up, and there is one price at which no site would rather have more or less."""
    capacity = between(sites, part)
    ranks = continuous(sites, capacity)
    assert ranks is not None
    assert all(s.least <= r <= s.most for s, r in zip(sites, ranks, strict=True))
    taken = math.fsum(s.nbytes * r for s, r in zip(sites, ranks, strict=True))
    close = 1e-9 * capacity  # some hundred roundings of 1e-16 each
    assert taken <= capacity + close
    price = [s.error / (s.nbytes * r * r) for s, r in zip(sites, ranks, strict=True)]
    eps = 1 + 1e-9
    may_grow = [p for p, s, r in zip(price, sites, ranks, strict=True) if r * eps < s.most]
    may_shrink = [p for p, s, r in zip(price, sites, ranks, strict=True) if r > s.least * eps]
    assert max(may_grow, default=0.0) <= min(may_shrink, default=math.inf) * eps**3
    if may_grow:
        assert taken >= capacity - close


@settings(max_examples=100, deadline=None)
@given(sites=many, parts=st.tuples(share, share))
def test_a_larger_capacity_gives_no_site_less_in_the_closed_form(sites: list[RankSite], parts: tuple[float, float]):
    low, high = (continuous(sites, between(sites, p)) for p in sorted(parts))
    assert low is not None
    assert high is not None
    assert all(a <= b * (1 + 1e-9) for a, b in zip(low, high, strict=True))


@settings(max_examples=150, deadline=None)
@given(sites=many, parts=st.tuples(share, share))
def test_ranks_are_on_the_grid_within_the_capacity_and_a_larger_one_never_errs_more(
    sites: list[RankSite], parts: tuple[float, float]
):
    errors = []
    for part in sorted(parts):
        capacity = between(sites, part)
        ranks = choose_ranks(sites, capacity)
        assert ranks is not None
        assert all(r in grid(s) for s, r in zip(sites, ranks, strict=True))
        assert bytes_at(sites, ranks) <= capacity
        best = continuous(sites, capacity)
        assert best is not None
        above = max(gain(s, r) for s, r in zip(sites, ranks, strict=True))  # the first step that did not fit is one of these
        # between r and r' <= 2 r the chord of 1 / r is (r + r')^2 / (4 r r') <= 9/8 times as high at most
        assert error_at(sites, ranks) <= (9 / 8 * error_at(sites, best) + above) * (1 + 1e-9)
        errors.append(error_at(sites, ranks))
    assert errors[1] <= errors[0] * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(sites=small, part=share)
def test_the_best_choice_on_the_grid_is_better_by_less_than_one_step(sites: list[RankSite], part: float):
    """Nothing that fits has a smaller error than the ascent's but for the gain of the first step that did not fit: its gain
    per byte is the largest of what is left, and fewer bytes than it takes are."""
    capacity = between(sites, part)
    ranks = choose_ranks(sites, capacity)
    assert ranks is not None
    choices = [c for c in itertools.product(*map(grid, sites)) if bytes_at(sites, c) <= capacity]
    best = min(error_at(sites, c) for c in choices)
    above = max(gain(s, r) for s, r in zip(sites, ranks, strict=True))
    assert best <= error_at(sites, ranks) * (1 + 1e-12)
    assert error_at(sites, ranks) <= (best + above) * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(sites=many, part=share)
def test_the_closed_form_only_shortens_the_ascent(sites: list[RankSite], part: float):
    """Step by step from the smallest ranks."""
    left = between(sites, part) - least_bytes(sites)
    ranks, open_ = [s.least for s in sites], {i for i, s in enumerate(sites) if s.least < s.most}

    def worth(i: int) -> float:
        after = sites[i].after(ranks[i])
        assert after is not None
        return sites[i].error / (sites[i].nbytes * ranks[i] * after)

    while open_:
        i = min(open_, key=lambda i: (-worth(i), sites[i], i))
        after = sites[i].after(ranks[i]) or 0
        needed = sites[i].nbytes * (after - ranks[i])
        if needed <= left:
            ranks[i], left = after, left - needed
        if ranks[i] != after or after == sites[i].most:
            open_.discard(i)
    assert choose_ranks(sites, between(sites, part)) == tuple(ranks)


@settings(max_examples=150, deadline=None)
@given(sites=many, part=share, seed=st.integers(0, 99))
def test_the_order_of_the_sites_does_not_matter(sites: list[RankSite], part: float, seed: int):
    capacity = between(sites, part)
    other = random.Random(seed).sample(sites, len(sites))
    mine, theirs = choose_ranks(sites, capacity), choose_ranks(other, capacity)
    assert mine is not None
    assert theirs is not None
    assert sorted(zip(sites, mine, strict=True)) == sorted(zip(other, theirs, strict=True))


def test_nothing_fits_below_the_smallest_ranks_and_all_does_above_the_largest():
    sites = [RankSite(1.0, 10, 100), RankSite(0.0, 3, 5)]
    assert choose_ranks(sites, 8 * 10 + 5 * 3 - 1) is None
    assert continuous(sites, 8 * 10 + 5 * 3 - 1) is None
    assert choose_ranks(sites, 8 * 10 + 5 * 3) == (8, 5)
    assert choose_ranks(sites, 10**9) == (100, 5)
    assert choose_ranks([], 0) == ()


def test_the_example_of_the_docs():
    module = sys.modules[choose_ranks.__module__]
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=1)


def test_what_has_no_error_gets_what_the_others_leave():
    sites = [RankSite(0.0, 1, 64), RankSite(1.0, 1, 64)]
    assert continuous(sites, 40) == (8.0, 32.0)
    assert choose_ranks(sites, 40) == (8, 32)
    assert choose_ranks(sites, 80) == (16, 64)


def test_equal_sites_get_equal_ranks_but_for_the_last_steps():
    ranks = choose_ranks([RankSite(3.0, 7, 512)] * 5, 5 * 7 * 100 + 7 * 16 * 2)
    assert ranks == (112, 112, 112, 96, 96)


@pytest.mark.parametrize("changes", [{"error": math.nan}, {"error": -1.0}, {"nbytes": 0}, {"most": 0}, {"multiple": 12}])
def test_a_site_that_is_none(changes: dict[str, float]):
    with pytest.raises(ValueError, match=r"not usable. Allowed"):
        RankSite(**{"error": 1.0, "nbytes": 1, "most": 8, **changes})


def large(count: int) -> list[RankSite]:
    draw = random.Random(0)
    return [RankSite(draw.uniform(1, 1e9), draw.randrange(1, 1 << 16), draw.randrange(64, 16384)) for _ in range(count)]


def test_a_thousand_sites_take_a_moment():
    sites = large(1000)
    began = time.process_time()
    ranks = choose_ranks(sites, between(sites, 0.3))
    assert time.process_time() - began < 1.0
    assert ranks is not None
    assert bytes_at(sites, ranks) > 0.999 * between(sites, 0.3)


@pytest.mark.slow
def test_the_same_in_processes_with_other_hash_seeds():
    code = "from tests.test_rank_choice import *; s = large(200); print(choose_ranks(s, between(s, 0.2)))"
    first, second = in_processes(code)
    assert first == second

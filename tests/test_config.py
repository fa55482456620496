"""Options: what is understood, and what a mistake is told."""

from __future__ import annotations

import math

import pytest
import torch

from actpass import BudgetError, OptionError
from actpass.options.config import Treatment, matches, parse


def test_options_default_to_auto():
    config = parse(None)
    assert (config.treatment.method, config.treatment.codec, config.treatment.projection) == ("auto", "auto", None)
    assert config.needs_seed  # for stochastic rounding
    assert not parse({"method": "exact"}).needs_seed
    assert not parse({"method": "int8", "rounding": "nearest"}).needs_seed
    assert parse({"rank": 0.25}).treatment.projection == "haar"


def test_options_overrides_refine_by_path_and_the_last_match_wins():
    config = parse(
        {"method": "haar", "rank": 0.5, "overrides": {"mlp": {"rank": 8}, "mlp.down_proj": "keep", "lm_head": "srht"}}
    )
    assert config.treatment_of(("layers.0.mlp.up_proj.weight",))[0] == Treatment("haar", 8, named=True)
    assert config.treatment_of(("layers.0.mlp.down_proj.weight",))[0].method == "exact"
    assert config.treatment_of(("lm_head.weight",))[0] == Treatment("srht", 0.5, named=True)
    assert config.treatment_of(("layers.0.attn.q.weight",))[0] == Treatment("haar", 0.5)


def test_ranks_from_the_budget_for_all_or_for_some():
    assert parse({"method": "srht", "rank": "budget", "memory_budget": "2GB"}).ranks_from_budget
    some = parse({"method": "exact", "memory_budget": 0.5, "overrides": {"mlp": {"method": "haar", "rank": "budget"}}})
    assert some.ranks_from_budget
    assert not some.treatment.ranks_from_budget
    inherited = parse({"method": "exact", "rank": "budget", "memory_budget": 0.5, "overrides": {"mlp": "haar"}})
    assert inherited.treatment_of(("mlp.up.weight",))[0].ranks_from_budget
    assert not parse({"method": "haar", "rank": 8, "memory_budget": 0.5}).ranks_from_budget


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("layers.*.mlp", "model.layers.3.mlp.gate_proj.weight", True),
        ("lm_head", "lm_head.weight", True),
        ("head", "lm_head.weight", False),
        ("layers.1", "layers.11.mlp", False),
        ("*", "anything", True),
    ],
)
def test_override_patterns_match_whole_path_segments(pattern: str, path: str, expected: bool):
    assert matches(pattern, path) is expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methd": "haar"}, r"unknown option 'methd'. Did you mean 'method'\?.*Known: "),
        ({"fallback": "warning"}, r"unknown fallback 'warning'. Did you mean 'warn'\?.*Known: error, warn"),
        ({"method": "har"}, r"unknown method 'har'. Did you mean 'haar'\?"),
        ({"method": 3}, r"unknown method 3"),
        ({"rank": 0}, r"rank=0 is not positive. Allowed"),
        ({"rank": -4}, r"rank=-4 is not positive"),
        ({"rank": 1.5}, r"rank=1.5 is outside \(0, 1\]"),
        ({"rank": 0.0}, r"rank=0.0 is outside"),
        ({"rank": math.nan}, r"rank=nan is outside"),
        ({"rank": "half"}, r"rank='half' is not a number"),
        ({"rank": True}, r"rank=True is not a number"),
        ({"method": "haar", "rank": "budgett"}, r"rank='budgett' is not a number. Allowed: .*or 'budget'"),
        ({"method": "haar", "rank": "budget"}, r"rank='budget' takes the ranks from a budget, and there is none. Give one"),
        ({"rank": "budget"}, r"not with method='auto', which meets a budget by bits"),
        ({"method": "int8", "rank": "budget", "memory_budget": 0.5}, r"not with method='int8', which has no rank"),
        ({"method": "haar", "rank": "budget", "scale": "none", "memory_budget": 0.5}, r"Allowed with it: scale='unbiased'"),
        (
            {"memory_budget": 0.5, "overrides": {"mlp": {"rank": "budget"}}},
            r"rank='budget' in overrides\['mlp'\] goes with a projection .*not with method='auto'",
        ),
        ({"method": "int3"}, r"unknown method 'int3'. Did you mean .*Known: auto, exact, .*int4"),
        ({"quantize": "int4"}, r"quantize='int4' goes with a projection.*Use method='int4'"),
        ({"method": "haar", "quantize": "int5"}, r"unknown quantize 'int5'"),
        ({"group": 4}, r"group=4 is not usable. Allowed: an int in \[8, 4096\]"),
        ({"rounding": "up"}, r"unknown rounding 'up'. Known: auto, stochastic, nearest"),
        ({"rotate": 1}, r"rotate=1 is not usable"),
        ({"smallest": -1}, r"smallest=-1 is not usable"),
        ({"scale": "biased"}, r"unknown scale 'biased'. Did you mean 'unbiased'\? Known: unbiased, none"),
        ({"refresh_interval": 0}, r"refresh_interval=0 is not usable. Allowed: an int in \[1, "),
        ({"seed": -1}, r"seed=-1 is not usable"),
        ({"profitable_only": 1}, r"profitable_only=1 is not usable"),
        ({"overrides": ["lm_head"]}, r"overrides=\['lm_head'\] is not a mapping"),
        ({"overrides": {"lm_head": 3}}, r"3 in overrides\['lm_head'\] is not usable"),
        (
            {"overrides": {"lm_head": {"rnk": 3}}},
            r"unknown option in overrides\['lm_head'\] 'rnk'. Did you mean 'rank'",
        ),
        ({"inductor": "fast"}, r"inductor='fast' is not a mapping"),
    ],
)
def test_options_mistakes_name_value_and_remedy(options: dict, says: str):
    with pytest.raises(OptionError, match=says):
        parse(options)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("a lot", "is not a number"),
        (True, "is not a number"),
        (math.nan, "is outside"),
        (-0.1, "is outside"),
        (1.5, "is outside"),
        (0.5 + 1, "is outside"),
        (-1, "is outside"),
        (-(10**9), "is outside"),
        (math.inf, "is outside"),
        (10**30, "more than any machine has"),
        ("20 GiBit", "is not a number of bytes"),
        ("-2GB", "is not a number of bytes"),
        ("", "is not a number of bytes"),
        ([1], "is not a number"),
        ("0GB", "is 0 bytes"),  # a string is bytes, never a fraction
        ("1 B", "is 1 bytes"),
    ],
)
def test_memory_budget_mistakes_name_value_and_remedy(budget: object, says: str):
    with pytest.raises(BudgetError, match=says):
        parse({"memory_budget": budget})


@pytest.mark.parametrize(
    ("budget", "parsed"),
    [
        (None, None),
        (0, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        (2, 2),
        ("20GiB", 20 * 2**30),
        ("800 MB", 800 * 10**6),
        ("1.5gb", 15 * 10**8),
        ("100000b", 100_000),
        (2**40, 2**40),
    ],
)
def test_memory_budgets_in_every_unit(budget: object, parsed: object):
    found = parse({"memory_budget": budget}).memory_budget
    assert found == parsed
    assert type(found) is type(parsed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it means what that has free")
def test_an_automatic_budget_needs_a_device_that_knows_what_is_free():
    with pytest.raises(BudgetError, match=r"there is none. Give the bytes"):
        parse({"memory_budget": "auto"})


def test_rank_above_the_width_is_an_error_that_names_both():
    with pytest.raises(OptionError, match=r"rank=64 is larger than the width 32.*Use rank=0.25"):
        Treatment("haar", 64).rank_of(32)


def test_option_errors_reach_the_user_through_torch_compile():
    model = torch.compile(torch.nn.Linear(4, 4), backend="actcomp", options={"rank": 0})
    with pytest.raises(Exception, match="rank=0 is not positive"):
        model(torch.randn(2, 4))


def test_rank_above_the_width_reaches_the_user_through_torch_compile():
    model = torch.compile(torch.nn.Linear(4, 4), backend="actcomp", options={"method": "haar", "rank": 64})
    with pytest.raises(Exception, match="rank=64 is larger than the width 4"):
        model(torch.randn(2, 4))

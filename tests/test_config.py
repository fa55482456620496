"""Options: what is understood, and what a mistake is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from actpass import BudgetError, OptionError
from actpass.options import TensorOptions, matches, options_for, parse
from actpass.options.old_names import OLD_NAMES


def test_options_default_to_auto():
    config = parse(None)
    assert config.tensor_options == TensorOptions(policy="auto", codec=None, projection=None)
    assert config.needs_seed  # for stochastic rounding
    assert not parse({"policy": "exact"}).needs_seed
    assert not parse({"codec": "int8", "rounding": "nearest"}).needs_seed


@pytest.mark.parametrize(
    ("options", "policy", "described"),
    [
        ({}, "auto", "policy='auto'"),
        ({"policy": "exact"}, "exact", "policy='exact'"),
        ({"codec": "int8"}, "uniform", "codec='int8'"),
        ({"projection": "haar"}, "exact", "projection='haar'"),
        ({"projection": "haar", "codec": "int8"}, "uniform", "projection='haar', codec='int8'"),
        ({"policy": "auto", "projection": "haar", "rank": 0.25}, "auto", "policy='auto', projection='haar'"),
        ({"policy": "exact", "projection": "haar"}, "exact", "projection='haar'"),
    ],
    ids=str,
)
def test_the_policy_follows_from_codec_and_projection(options: dict, policy: str, described: str):
    found = parse(options).tensor_options
    assert (found.policy, found.codec, found.projection) == (policy, options.get("codec"), options.get("projection"))
    assert found.described == described


def test_a_name_is_the_value_of_one_option():
    assert options_for("auto") == {"policy": "auto"}
    assert options_for("float8_e4m3") == {"codec": "float8_e4m3"}
    assert options_for("prac") == {"projection": "prac"}
    with pytest.raises(OptionError, match=r"unknown policy, codec or projection 'har'. Did you mean 'haar'\?"):
        options_for("har")


def test_options_overrides_refine_by_path_and_the_last_match_wins():
    overrides = {"mlp": {"rank": 8}, "mlp.down_proj": "save", "lm_head": "srht", "norm": "int8"}
    config = parse({"projection": "haar", "rank": 0.5, "module_overrides": overrides})
    haar = TensorOptions(policy="exact", projection="haar", rank=0.5)
    assert config.tensor_options_of(("layers.0.mlp.up_proj.weight",))[0] == replace(haar, rank=8, forced=True)
    assert config.tensor_options_of(("layers.0.mlp.down_proj.weight",))[0] == replace(haar, projection=None, forced=True)
    assert config.tensor_options_of(("lm_head.weight",))[0] == replace(haar, projection="srht", forced=True)
    assert config.tensor_options_of(("norm.weight",))[0] == replace(
        haar, policy="uniform", projection=None, codec="int8", forced=True
    )
    assert config.tensor_options_of(("layers.0.attn.q.weight",))[0] == haar


def test_ranks_from_the_budget_for_all_or_for_some():
    assert parse({"projection": "srht", "rank": "budget", "memory_budget": "2GB"}).ranks_from_budget
    override = {"mlp": {"projection": "haar", "rank": "budget"}}
    some = parse({"policy": "exact", "memory_budget": 0.5, "module_overrides": override})
    assert some.ranks_from_budget
    assert not some.tensor_options.ranks_from_budget
    inherited = parse({"policy": "exact", "rank": "budget", "memory_budget": 0.5, "module_overrides": {"mlp": "haar"}})
    assert inherited.tensor_options_of(("mlp.up.weight",))[0].ranks_from_budget
    assert not parse({"projection": "haar", "rank": 8, "memory_budget": 0.5}).ranks_from_budget


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
        ({"polcy": "auto"}, r"unknown option 'polcy'. Did you mean 'policy'\?.*Known: "),
        ({"fallback": "warning"}, r"unknown fallback 'warning'. Did you mean 'warn'\?.*Known: error, warn"),
        ({"projection": "har"}, r"unknown projection 'har'. Did you mean 'haar'\?"),
        ({"projection": 3}, r"unknown projection 3"),
        ({"policy": "int8"}, r"unknown policy 'int8'.*Known: auto, exact"),
        ({"policy": "auto", "codec": "int8"}, r"policy='auto' can't be given with codec='int8'.*Leave out the policy"),
        ({"policy": "exact", "codec": "int8"}, r"policy='exact' can't be given with codec='int8'.*leave out the codec"),
        ({"rank": 0}, r"rank=0 is not positive. Allowed"),
        ({"rank": -4}, r"rank=-4 is not positive"),
        ({"rank": 1.5}, r"rank=1.5 is outside \(0, 1\]"),
        ({"rank": 0.0}, r"rank=0.0 is outside"),
        ({"rank": math.nan}, r"rank=nan is outside"),
        ({"rank": "half"}, r"rank='half' is not a number"),
        ({"rank": True}, r"rank=True is not a number"),
        ({"rank": 0.25}, r"rank=0.25 goes with a projection .*not with policy='auto', which has no rank"),
        ({"codec": "int8", "rank": 8}, r"rank=8 goes with a projection .*not with codec='int8'"),
        ({"projection": "haar", "rank": "budgett"}, r"rank='budgett' is not a number. Allowed: .*or 'budget'"),
        ({"projection": "haar", "rank": "budget"}, r"rank='budget' takes the ranks from a budget, and there is none. Give one"),
        ({"rank": "budget"}, r"not with policy='auto', which meets a budget by bits"),
        ({"codec": "int8", "rank": "budget", "memory_budget": 0.5}, r"not with codec='int8', which has no rank"),
        (
            {"projection": "haar", "rank": "budget", "projection_scaling": "orthonormal", "memory_budget": 0.5},
            r"Allowed with it: projection_scaling='unbiased'",
        ),
        ({"projection_scaling": "orthonormal"}, r"projection_scaling='orthonormal' goes with a projection"),
        (
            {"memory_budget": 0.5, "module_overrides": {"mlp": {"rank": "budget"}}},
            r"rank='budget' in module_overrides\['mlp'\] goes with a projection .*not with policy='auto'",
        ),
        ({"codec": "int3"}, r"unknown codec 'int3'. Did you mean .*Known: .*int16, .*int4"),
        ({"projection": "haar", "codec": "int5"}, r"unknown codec 'int5'"),
        ({"group_size": 4}, r"group_size=4 is not usable. Allowed: an int in \[8, 4096\]"),
        ({"rounding": "up"}, r"unknown rounding 'up'. Known: auto, stochastic, nearest"),
        ({"hadamard_rotation": 1}, r"hadamard_rotation=1 is not usable"),
        ({"min_tensor_bytes": -1}, r"min_tensor_bytes=-1 is not usable"),
        (
            {"projection_scaling": "biased"},
            r"unknown projection_scaling 'biased'. Did you mean 'unbiased'\? Known: unbiased, orthonormal",
        ),
        ({"refresh_interval": 0}, r"refresh_interval=0 is not usable. Allowed: an int in \[1, "),
        ({"seed": -1}, r"seed=-1 is not usable"),
        ({"skip_unprofitable": 1}, r"skip_unprofitable=1 is not usable"),
        ({"module_overrides": ["lm_head"]}, r"module_overrides=\['lm_head'\] is not a mapping"),
        ({"module_overrides": {"lm_head": 3}}, r"3 in module_overrides\['lm_head'\] is not usable"),
        (
            {"module_overrides": {"lm_head": {"rnk": 3}}},
            r"unknown option in module_overrides\['lm_head'\] 'rnk'. Did you mean 'rank'",
        ),
        ({"inductor_options": "fast"}, r"inductor_options='fast' is not a mapping"),
        ({"method": "int8"}, r"unknown option 'method': it is codec='int8' now"),
        ({"method": "fp8"}, r"unknown option 'method': it is codec='float8_e4m3' now"),
        ({"method": "haar", "rank": 8}, r"unknown option 'method': it is projection='haar' now"),
        ({"codec": "fp8_e5m2"}, r"unknown codec 'fp8_e5m2': it is 'float8_e5m2' now"),
        ({"module_overrides": {"mlp": "keep"}}, r"unknown override 'keep' in module_overrides\['mlp'\]: it is 'save' now"),
        (
            {"module_overrides": {"mlp": {"quantize": "int4"}}},
            r"unknown option in module_overrides\['mlp'\] 'quantize': it is 'codec' now",
        ),
    ],
)
def test_options_mistakes_name_value_and_remedy(options: dict, says: str):
    with pytest.raises(OptionError, match=says):
        parse(options)


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_option_is_told_by_its_new_name(name: str):
    with pytest.raises(OptionError, match=f"unknown option {name!r}: it is .*{OLD_NAMES[name]}.* now"):
        parse({name: None})


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
        TensorOptions(projection="haar", rank=64).rank_of(32)


def test_option_errors_reach_the_user_through_torch_compile():
    model = torch.compile(torch.nn.Linear(4, 4), backend="actcomp", options={"rank": 0})
    with pytest.raises(Exception, match="rank=0 is not positive"):
        model(torch.randn(2, 4))


def test_rank_above_the_width_reaches_the_user_through_torch_compile():
    model = torch.compile(torch.nn.Linear(4, 4), backend="actcomp", options={"projection": "haar", "rank": 64})
    with pytest.raises(Exception, match="rank=64 is larger than the width 4"):
        model(torch.randn(2, 4))

"""Low-rank adapters beside frozen weights: rebuilt with dropout as without, narrow products exact, factors not projected."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.reporting import Report

from .helpers import eager_actcomp, error

WIDTH, HIDDEN, RANK, TOKENS, LAYERS = 128, 256, 8, 512, 2


class Adapted(nn.Module):
    """A frozen matrix and a trained one of rank `RANK`, with dropout in front of its first factor."""

    def __init__(self, width: int, out: int, dropout: float) -> None:
        super().__init__()
        self.base = nn.Linear(width, out, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, out, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * 2.0


class Layers(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        for i in range(LAYERS):
            self.add_module(f"norm{i}", nn.RMSNorm(WIDTH))
            self.add_module(f"gate{i}", Adapted(WIDTH, HIDDEN, dropout))
            self.add_module(f"up{i}", Adapted(WIDTH, HIDDEN, dropout))
            self.add_module(f"down{i}", Adapted(HIDDEN, WIDTH, dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i in range(LAYERS):
            norm, gate, up, down = (self.get_submodule(f"{name}{i}") for name in ("norm", "gate", "up", "down"))
            h = norm(x)
            x = x + down(F.silu(gate(h)) * up(h))
        return x.square().mean()


def explained(dropout: float, **options: object) -> Report:
    return actpass.explain(Layers(dropout), torch.randn(TOKENS, WIDTH), options=options)


def test_dropout_in_front_of_adapters_costs_its_masks_alone():
    masks = LAYERS * TOKENS * (2 * WIDTH + HIDDEN)  # a byte each
    without, with_it = (explained(p, policy="exact").totals for p in (0.0, 0.1))
    assert without.saved_bytes < without.saved_bytes_default
    assert with_it.saved_bytes <= without.saved_bytes + masks
    assert with_it.extra_matmuls == without.extra_matmuls == 0
    assert with_it.peak_bytes is not None
    assert with_it.peak_bytes_default is not None
    assert with_it.peak_bytes < with_it.peak_bytes_default


@pytest.mark.slow
def test_auto_leaves_what_saves_next_to_nothing_exact():
    """The products of first factors have `RANK` columns of 128 to 256; all of them are 3 % of the bytes."""
    sites = explained(0.0, policy="auto", min_tensor_bytes=0).regions[0].sites
    narrow = [s for s in sites if s.shape == (TOKENS, RANK) and s.bytes_after]
    assert len(narrow) == 3 * LAYERS
    assert all(s.codec is None and "next to nothing" in s.reason for s in narrow)
    assert any(s.codec for s in sites if s.shape == (TOKENS, HIDDEN))
    coded = explained(0.0, codec="int8", min_tensor_bytes=0).regions[0].sites
    assert all(s.codec == "int8" for s in coded if s.shape == (TOKENS, RANK) and s.bytes_after)


def worst_of_second_factors(**options: object) -> float:
    """The largest relative error of one's gradient."""
    torch.compiler.reset()
    torch.manual_seed(0)
    expected, x = Layers(0.0), torch.randn(TOKENS, WIDTH)
    model = copy.deepcopy(expected)
    expected(x).backward()
    torch.compile(model, backend=eager_actcomp(options))(x).backward()
    names = [n for n, _ in model.named_parameters() if n.endswith(".b.weight")]
    return max(error(model.get_parameter(n).grad, expected.get_parameter(n).grad) for n in names)


@pytest.mark.slow
def test_gradients_of_second_factors_are_no_worse_under_auto_than_in_8_bits():
    """They are formed from the narrow products."""
    auto, eight, four = (worst_of_second_factors(**o) for o in ({"policy": "auto"}, {"codec": "int8"}, {"codec": "int4"}))
    assert auto <= 1.5 * eight < 0.5 * four


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["dense", "low_rank"])
def test_adapters_are_not_projected(gradients: str):
    """The first layer of all, which is no adapter, is; and an override that names one means it."""
    options = {"projection": "haar", "rank": 0.25, "weight_gradient_format": gradients, "skip_unprofitable": False}
    report = explained(0.0, **options)
    decisions = report.regions[0].plan["decisions"]
    projected = {p for d in decisions if d["rank"] for p in d["parameters"]}
    assert projected == {"first.weight"}
    assert all("narrow" in d["reason"] for d in decisions if not d["rank"])
    asked = explained(0.0, **options, module_overrides={"gate0.a": "haar"})
    assert "gate0.a.weight" in {p for d in asked.regions[0].plan["decisions"] if d["rank"] for p in d["parameters"]}

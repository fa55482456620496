"""Every low-bit form, and one that is added by the documented recipe (one registered class), works as a method, as an
override, under a budget and in a plan file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass import codecs
from actpass.codecs.quantizers.integer import Integer
from actpass.reporting import Report


@dataclass(frozen=True)
class Wide(Integer):
    """8 bits in groups of 128."""

    @property
    def name(self) -> str:
        return "int8_wide"


NAMES = (*codecs.QUANTIZERS, "int8_wide")


@pytest.fixture(params=NAMES)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with codecs.QUANTIZERS.temporary():
        if request.param not in codecs.QUANTIZERS:
            codecs.register_codec(Wide(8, 255, 128))
        yield request.param


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.second(F.gelu(self.first(x)))).square().mean()


def explained(**options: Any) -> Report:
    return actpass.explain(Layers(), torch.randn(256, 64), options={"smallest": 0, **options})


def forms_of(report: Report) -> set[str]:
    assert report.active
    return {s["codec"] for region in report.regions for s in region.plan["storages"]} - {"keep"}


def test_a_form_works_wherever_forms_do(form: str, tmp_path: Path):
    whole = explained(method=form)
    assert forms_of(whole) == {form}
    tight = math.ceil(100 * whole.totals.saved_bytes / whole.totals.saved_bytes_default) / 100
    for budget in (tight, 0.9):  # where something is run again, or rebuilt, the rest may do as it is
        assert forms_of(explained(method=form, memory_budget=budget)) <= {form}
    assert forms_of(explained(method="exact", overrides={"*": form})) == {form}
    assert forms_of(explained(memory_budget=0.9, overrides={"*": form})) <= {form}
    whole.plan.save(tmp_path / "plan.json")
    followed = actpass.explain(Layers(), torch.randn(256, 64), options={"plan": str(tmp_path / "plan.json")})
    assert forms_of(followed) == {form}
    assert followed.plan.hash == whole.plan.hash

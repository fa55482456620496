"""The curves of a report and the pictures of them: the numbers are those of the predictions and of eager mode, to the byte."""

from __future__ import annotations

import csv
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import actpass
from actpass.codecs import QUANTIZERS
from actpass.memory.footprint import Footprint, step_peak
from actpass.memory.memory_curve import POINTS, Curve, step_curve, thin
from actpass.memory.profiler import measure
from actpass.plan.pareto import Point, Tradeoff, add_up
from actpass.plan.storage_options import CANCELLING, SHARE_IN_A_CONTRACTION
from actpass.reporting import Record, Report

from . import models
from .helpers import eager_actcomp
from .test_report import _loss


class Checkpointed(nn.Module):
    """A middle that is run again in the backward, long enough to weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x).exp().sin().exp().sin().exp().cos()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.utils.checkpoint.checkpoint(self.middle, x, use_reentrant=False)).square().mean()


def checkpointed() -> models.Made:
    return Checkpointed(), {"x": torch.randn(1024, 32)}


def convolution() -> models.Made:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    return Loss(model), {"x": torch.randn(4, 3, 16, 16)}


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).square().mean()


def in_two_regions() -> Report:
    """The report of a step of two regions."""
    model, inputs = models.mlp()
    function = torch.compile(lambda x: _loss(model.mid(F.gelu(model.up(x)))), backend=eager_actcomp())
    function(**inputs).backward()
    return actpass.report(model)


@functools.cache
def of_a_transformer() -> Report:
    model, inputs = models.transformer(layers=1)
    return actpass.explain(model, options={"policy": "auto", "min_tensor_bytes": 64}, **inputs)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # long lists, drawn while another worker compiles
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=700))
def test_thinned_levels_are_few_and_keep_the_highest(levels: list[int]):
    kept = thin(levels)
    assert len(kept) == min(len(levels), POINTS)
    assert max(kept) == max(levels)
    assert set(kept) <= set(levels)


levels = st.lists(st.integers(0, 1000), min_size=1, max_size=5).map(tuple)


@given(st.lists(st.builds(Curve, levels, levels, *[st.integers(0, 500)] * 4), min_size=1, max_size=4))
def test_a_steps_curve_is_highest_at_the_peak_of_its_footprints(calls: list[Curve]):
    footprints = [Footprint(max(c.forward), max(c.backward), c.held, 0, c.gradients, c.passed, c.tangents) for c in calls]
    step = step_curve(calls, [1] * len(calls))
    assert step.peak.nbytes == max(step.nbytes) == step_peak(footprints)
    assert list(step.positions) == sorted(step.positions)
    assert 0 < step.positions[0] < 1 < step.positions[-1] < 2
    assert step.peak.backward == (step.peak.position > 1)


@pytest.mark.parametrize(
    "options", [{"policy": "exact"}, {"policy": "auto", "min_tensor_bytes": 64}, {"memory_budget": 1.0}], ids=str
)
def test_curves_end_exactly_at_the_predicted_peaks(options: dict[str, Any]):
    model, inputs = models.transformer()
    report = actpass.explain(model, options=options, **inputs)
    (region,) = report.regions
    curves, totals = region.curves, report.totals
    assert curves is not None
    assert step_curve([curves.plan], [1]).peak.nbytes == totals.peak_bytes
    assert step_curve([curves.default], [1]).peak.nbytes == totals.peak_bytes_default
    assert max(len(c.forward) for c in (curves.plan, curves.default)) <= POINTS


def test_curves_of_several_regions_end_at_the_peak_of_the_step():
    report = in_two_regions()
    assert len(report.regions) == 2
    curves = [r.curves for r in report.regions if r.curves is not None]
    assert step_curve([c.plan for c in curves], [1, 1]).peak.nbytes == report.totals.peak_bytes
    assert step_curve([c.default for c in curves], [1, 1]).peak.nbytes == report.totals.peak_bytes_default


def test_curves_survive_the_disk():
    (region,) = of_a_transformer().regions
    assert region.curves is not None
    assert region.curves.eager is not None
    again = Record.from_dict(json.loads(json.dumps(region.to_dict())))
    assert again.curves == region.curves


def test_the_largest_tensors_at_the_peak_are_named_by_kind_and_module():
    (region,) = of_a_transformer().regions
    assert region.curves is not None
    held = region.curves.at_backward_peak
    assert len(held) == 3
    assert [h.nbytes for h in held] == sorted((h.nbytes for h in held), reverse=True)
    assert all(h.what and h.module.startswith("blocks.") for h in held)
    (region,) = actpass.explain(nn.Sequential(Wide()), torch.randn(4, 8), options={"policy": "exact"}).regions
    assert region.curves is not None
    assert str(region.curves.at_backward_peak[0]) == "gradient of 0.linear.weight"


class Wide(nn.Module):
    """A weight that is larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 500)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


CASES = [models.mlp, models.transformer, checkpointed, convolution]


@pytest.mark.parametrize("build", CASES, ids=lambda f: f.__name__)
def test_eager_curve_is_what_is_measured_in_eager_mode(build: Any):
    """To the byte but for what no operator returns: what a kernel allocates inside itself (attention's threads, convolution's
    packed weights), and the 5 kB of random state that a checkpoint keeps."""
    model, inputs = build()
    (region,) = actpass.explain(model, **inputs).regions
    assert region.curves is not None
    assert region.curves.eager is not None
    predicted = step_curve([region.curves.eager], [1]).peak.nbytes

    def step() -> None:
        model(**inputs).backward()

    step()
    model.zero_grad(set_to_none=True)
    measured = measure(step)
    assert measured.kept_bytes == region.curves.eager.gradients
    assert predicted == pytest.approx(measured.peak_bytes, rel=0.01)


def test_eager_curve_comes_with_the_compiled_step_and_from_its_record():
    model, inputs = models.mlp()
    torch.compile(model, backend=eager_actcomp())(**inputs).backward()
    (compiled,) = actpass.report(model).regions
    (explained,) = actpass.explain(model, **inputs).regions
    assert compiled.curves is not None
    assert compiled.curves.eager is not None
    assert compiled.curves == explained.curves


def test_eager_curve_of_a_region_that_writes_to_what_another_computed():
    model, later = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        h = model(x)
        torch._dynamo.graph_break()
        return later(h.mul_(2).sin()).sum()

    torch.compile(forward, backend=eager_actcomp())(torch.randn(4, 8)).backward()
    (region,) = actpass.report(later).regions
    assert region.curves is not None
    assert region.curves.eager is not None
    assert region.curves.eager.passed == 4 * 8 * 4


@pytest.mark.slow
def test_eager_curve_that_fails_costs_a_note_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def unknown(*_: Any) -> Any:
        raise NotImplementedError("no fake implementation")

    monkeypatch.setattr("actpass.reporting.eager_estimate._Root.apply", unknown)
    model, inputs = models.mlp()
    torch.compile(model, backend=eager_actcomp())(**inputs).backward()
    report = actpass.report(model)
    assert report.active
    assert "note: what eager mode takes is not known: NotImplementedError: no fake implementation" in str(report)
    report.plot_peak(tmp_path / "peak.svg")
    assert {row["curve"] for row in numbers(tmp_path / "peak.csv")} == {"Inductor", "actpass"}
    assert "eager: not known" in text_of(tmp_path / "peak.svg")


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def text_of(picture: Path) -> str:
    """The words of an SVG (matplotlib writes each as a comment beside its outlines)."""
    lines = picture.read_text().splitlines()
    return "\n".join(line.strip().removeprefix("<!-- ").removesuffix(" -->") for line in lines if "<!--" in line)


def test_peak_picture_shows_three_curves_with_their_peaks(tmp_path: Path):
    report = of_a_transformer()
    report.plot_peak(tmp_path / "new" / "peak.svg")
    report.plot_peak(str(tmp_path / "peak.png"))
    assert (tmp_path / "peak.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = numbers(tmp_path / "new" / "peak.csv")
    assert rows == numbers(tmp_path / "peak.csv")
    highest = {name: max(int(r["bytes"]) for r in rows if r["curve"] == name) for name in ("eager", "Inductor", "actpass")}
    assert highest["actpass"] == report.totals.peak_bytes
    assert highest["Inductor"] == report.totals.peak_bytes_default
    words = text_of(tmp_path / "new" / "peak.svg")
    assert all(f"peak {nbytes / 1e6:.1f} MB" in words for nbytes in highest.values())
    assert "Largest at actpass's peak, in the" in words
    curves = report.regions[0].curves
    assert curves is not None
    peak = step_curve([curves.plan], [1]).peak
    held = (curves.at_backward_peak if peak.backward else curves.at_forward_peak)[0]
    assert held.what in words
    assert f"{held.nbytes / 1e6:.2f} MB" in words


def test_peak_picture_of_several_regions_names_the_one_at_the_peak(tmp_path: Path):
    report = in_two_regions()
    report.plot_peak(tmp_path / "peak.svg")
    assert "(region " in text_of(tmp_path / "peak.svg")
    assert max(int(r["bytes"]) for r in numbers(tmp_path / "peak.csv") if r["curve"] == "actpass") == report.totals.peak_bytes


@pytest.mark.parametrize("name", ["peak.pdf", "peak"])
def test_any_other_ending_is_an_error_that_says_which_are_allowed(name: str, tmp_path: Path):
    report = in_two_regions()
    with pytest.raises(actpass.PictureError, match=r"ends in \.svg or \.png, not"):
        report.plot_peak(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    report = in_two_regions()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(actpass.PictureError, match=r'pip install "actpass\[plot\]"'):
        report.plot_peak(tmp_path / "peak.svg")


def test_a_report_without_the_numbers_says_what_to_call(tmp_path: Path):
    with pytest.raises(actpass.ReportError, match="nothing to draw, because not yet"):
        Report((), "not yet").plot_peak(tmp_path / "peak.svg")
    model, inputs = models.mlp()
    report = actpass.explain(model, **inputs)
    report = replace(report, regions=tuple(replace(r, curves=None) for r in report.regions))
    with pytest.raises(actpass.ReportError, match="the peak of a region is not predicted: see its notes"):
        report.plot_peak(tmp_path / "peak.svg")
    with pytest.raises(actpass.ReportError, match=r"report = actpass\.explore\(model"):
        report.plot_pareto(tmp_path / "pareto.svg")


@functools.cache
def explored() -> Report:
    model, inputs = models.transformer(layers=1)
    return actpass.explore(model, options={"policy": "auto", "min_tensor_bytes": 64}, **inputs)


def test_explore_says_what_explain_says_and_what_other_budgets_would_give():
    (region,), (plain,) = explored().regions, of_a_transformer().regions
    assert plain.tradeoff is None
    assert (region.totals, region.plan_hash, region.curves) == (plain.totals, plain.plan_hash, plain.curves)
    found = region.tradeoff
    assert found is not None
    assert found.chosen.saved_bytes == region.totals.saved_bytes
    assert Record.from_dict(json.loads(json.dumps(region.to_dict()))) == region


def test_stock_curve_is_exact_and_falls_from_inductors_default():
    (region,) = explored().regions
    assert region.tradeoff is not None
    stock = region.tradeoff.stock
    assert [p.budget for p in stock] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert all(p.error == 0 for p in stock)
    assert (stock[0].saved_bytes, stock[0].extra_flops) == (region.totals.saved_bytes_default, 0)
    saved = [p.saved_bytes for p in stock]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] < 0.1 * saved[0]
    assert 0 < stock[-1].extra_flops < region.tradeoff.step_flops / 2  # at most one forward again, of a forward and a backward


def test_our_curve_starts_exact_and_keeps_within_its_capacities():
    (region,) = explored().regions
    assert region.tradeoff is not None
    ours = region.tradeoff.ours
    assert len(ours) == 10
    assert (ours[0].error, ours[0].extra_flops) == (0, 0)
    assert all(p.saved_bytes <= p.budget + 64 for p in ours[:-1])  # 64: the step's seed
    assert ours[-1].saved_bytes < 0.5 * ours[0].saved_bytes
    assert all(p.extra_flops > 0 for p in ours[1:])


def test_error_of_a_plan_is_the_sum_of_its_forms():
    """Each weighs its share of the elements (all float32 here), and what ends in one weight's gradient, which `auto` stores in
    4 bits, a quarter of that; the value and the output of attention, which it stores in 8, thirty times that."""
    (region,) = explored().regions
    assert region.tradeoff is not None
    storages, kinds = region.plan["storages"], {s.name: s.kind for s in region.sites}
    factors = {("attention", "int8"): CANCELLING}
    found = [(kinds[s["base"]], s["codec"]) for s in storages]
    assert found.count(("attention", "int8")) == 2
    more = [SHARE_IN_A_CONTRACTION if codec == "int4" else factors.get((kind, codec), 1.0) for kind, codec in found]
    weights = [
        (QUANTIZERS[s["codec"]].error if s["codec"] != "save" else 0.0) * factor * s["nbytes"]
        for s, factor in zip(storages, more, strict=True)
    ]
    assert region.tradeoff.chosen.error == pytest.approx(sum(weights) / sum(s["nbytes"] for s in storages))


def test_regions_add_up_bytes_and_time_and_weigh_errors_by_elements():
    a = Tradeoff(100, 30, 5, (Point(1.0, 10, 0.0, 0.0),), (Point(8, 8, 0.1, 4.0),), Point(0, 6, 0.2, 1.0))
    b = Tradeoff(300, 10, 0, (Point(1.0, 20, 0.0, 6.0),), (Point(9, 9, 0.5, 2.0),), Point(0, 7, 0.0, 3.0))
    both = add_up([a, b])
    assert (both.step_flops, both.elements, both.early_bytes) == (400, 40, 5)
    assert both.stock == (Point(1.0, 30, 0.0, 6.0),)
    (ours,) = both.ours
    assert (ours.budget, ours.saved_bytes, ours.extra_flops) == (17, 17, 6.0)
    assert ours.error == pytest.approx(0.2)
    assert both.chosen == Point(0, 13, pytest.approx(0.15), 4.0)


def test_pareto_picture_shows_both_curves_and_the_plan(tmp_path: Path):
    explored().plot_pareto(tmp_path / "pareto.svg")
    explored().plot_pareto(tmp_path / "pareto.png")
    rows = numbers(tmp_path / "pareto.csv")
    assert {name: sum(r["curve"] == name for r in rows) for name in ("Inductor", "actpass", "chosen")} == {
        "Inductor": 11, "actpass": 10, "chosen": 1
    }  # fmt: skip
    assert int(rows[-1]["saved_bytes"]) == explored().saved_bytes
    words = text_of(tmp_path / "pareto.svg")
    assert "predicted relative error of the gradients, %" in words
    assert "predicted extra time, % of a step's FLOPs" in words
    assert f"this plan: {explored().saved_bytes / 1e6:.1f} MB" in words


def test_explore_refuses_a_codec_that_is_named():
    model, inputs = models.mlp()
    with pytest.raises(actpass.OptionError, match="codec='int8' names the one format"):
        actpass.explore(model, options={"codec": "int8"}, **inputs)

"""A report as a page, as a memory snapshot and as artifacts of a trace: well-formed, escaped, and with the report's numbers."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz as memory_viz

import actpass
from actpass._format import megabytes
from actpass.memory.memory_curve import POINTS, step_curve, stretches
from actpass.reporting import Report
from actpass.reporting.html.saved import FORMS
from actpass.reporting.rows import folded

from . import models
from .test_pictures import explored, in_two_regions, of_a_transformer

EVIL = "blocks.<script>alert('x')</script>&\"quoted\""


class Page(HTMLParser):
    """What a page holds. Fails where a tag is not closed, or closes what was not opened last."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"{tag}: an attribute stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)

    def values(self, name: str) -> list[str]:
        return [a[name] or "" for _, a in self.tags if name in a]


def page_of(report: Report, folder: Path) -> Page:
    path = folder / "new" / "report.html"
    report.to_html(path)
    return Page(path.read_text(encoding="utf-8"))


@functools.cache
def in_few_bits() -> Report:
    model, inputs = models.mlp()
    return actpass.explain(model, options={"codec": "int8", "min_tensor_bytes": 64}, **inputs)


REPORTS = [of_a_transformer, in_two_regions, explored, in_few_bits, lambda: Report((), "not yet")]
NAMES = ["transformer", "two regions", "explored", "few bits", "inactive"]


@pytest.mark.slow
@pytest.mark.parametrize("make", REPORTS, ids=NAMES)
def test_page_is_well_formed_and_needs_no_other_file(make: Any, tmp_path: Path):
    page = page_of(make(), tmp_path)
    assert all(n == 1 for n in Counter(page.values("id")).values())
    assert set(page.values("aria-labelledby")) <= set(page.values("id"))
    assert page.values("href") == ["#main"]
    assert not page.values("src")
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.count("title") == page.count("h1") == page.count("main") == 1
    scrolling = [a for _, a in page.tags if a.get("class") == "scroll"]
    assert len(scrolling) == page.count("table")
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolling)
    pictures = [a for t, a in page.tags if t == "svg" and "viewbox" not in a]
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)


def test_page_has_the_numbers_of_the_report(tmp_path: Path):
    report = of_a_transformer()
    page, (region,), totals = page_of(report, tmp_path), report.regions, report.totals
    assert region.curves is not None
    assert region.curves.eager is not None
    assert totals.peak_bytes is not None
    assert totals.peak_bytes_default is not None
    eager = step_curve([region.curves.eager], [1]).peak.nbytes
    for nbytes in (totals.saved_bytes, totals.saved_bytes_default, totals.peak_bytes, totals.peak_bytes_default, eager):
        assert megabytes(nbytes) in page.text
    cells = Counter(map(float, page.values("data-value")))
    for row, count in folded(region.sites):
        assert cells[row.bytes_before * count]
        assert cells[row.bytes_after * count]
        assert row.reason in page.words
    assert {report.plan_hash, torch.__version__, actpass.__version__} <= set(page.words)
    assert all(note in page.words for note in region.notes)


@pytest.mark.parametrize("make", REPORTS[:4], ids=NAMES[:4])
def test_bars_by_form_kind_and_layer_each_add_up_to_what_is_saved(make: Any, tmp_path: Path):
    report = make()
    page = page_of(report, tmp_path)
    assert sum(map(int, page.values("data-after"))) == 3 * report.saved_bytes


def test_every_form_of_a_row_has_a_color_and_a_meaning():
    forms = {s.form for make in REPORTS for r in make().regions for s in r.sites}
    assert forms <= FORMS.keys()
    assert len({color for color, _ in FORMS.values()}) == len(FORMS)


@pytest.mark.parametrize("make", REPORTS[:4], ids=NAMES[:4])
def test_tensors_at_the_peak_add_up_to_it(make: Any, tmp_path: Path):
    report = make()
    report.to_html(tmp_path / "report.html")
    (table,) = re.findall(r"<caption>In memory at the peak.*?</table>", (tmp_path / "report.html").read_text(), re.DOTALL)
    shares = [int(n) for n in re.findall(r'data-value="(\d+)" title', table)]
    assert shares[-1] == sum(shares[:-1]) == report.totals.peak_bytes
    assert all(n > 0 for n in shares)


def test_layers_that_are_alike_are_one_row(tmp_path: Path):
    (region,) = of_a_transformer().regions
    sites = [replace(s, module=re.sub(r"blocks\.0", f"blocks.{i}", s.module)) for i in range(400) for s in region.sites]
    report = Report((replace(region, sites=tuple(sites)),))
    page = page_of(report, tmp_path)
    assert "blocks.0 to 399 (400 layers alike)" in page.words
    assert page.count("tr") < 4 * len(region.sites)


def test_what_the_user_named_is_escaped(tmp_path: Path):
    report = in_two_regions()
    first = report.regions[0]
    rows = tuple(replace(s, module=EVIL, reason=EVIL, source=EVIL) for s in first.sites)
    first = replace(first, sites=rows, notes=(EVIL,), rejected=((EVIL, EVIL, EVIL),), inactive_because=EVIL)
    report = replace(report, regions=(first, *report.regions[1:]), notes=(EVIL,))
    page = page_of(report, tmp_path)
    assert page.count("script") == 1
    assert EVIL in page.words


def test_page_of_an_inactive_report_says_why(tmp_path: Path):
    page = page_of(actpass.report(nn.Linear(2, 2)), tmp_path)
    assert "inactive, because no training step of this model has run" in page.text
    assert "status warning" in page.values("class")


def test_page_without_a_prediction_says_so(tmp_path: Path):
    report = in_two_regions()
    report = replace(report, regions=tuple(replace(r, curves=None, footprint=None) for r in report.regions))
    assert "is not predicted" in page_of(report, tmp_path).text


def test_budget_curve_is_there_only_where_it_was_asked_for(tmp_path: Path):
    assert "budgets" not in page_of(of_a_transformer(), tmp_path).values("id")
    (region,) = explored().regions
    assert region.tradeoff is not None
    page = page_of(explored(), tmp_path)
    assert "budgets" in page.values("id")
    assert {str(p.saved_bytes) for p in (*region.tradeoff.stock, *region.tradeoff.ours)} <= set(page.values("data-value"))


def replay(events: list[dict[str, Any]]) -> list[int]:
    """Bytes behind each event. Fails where memory is given twice or freed by what does not have it."""
    live: dict[int, int] = {}
    levels = []
    for event in events:
        if event["action"] == "alloc":
            assert all(event["addr"] + event["size"] <= a or a + n <= event["addr"] for a, n in live.items())
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        levels.append(sum(live.values()))
    return levels


def snapshot_of(report: Report, folder: Path) -> dict[str, Any]:
    report.save_memory_snapshot(folder / "new" / "step.pickle")
    return pickle.loads((folder / "new" / "step.pickle").read_bytes())


@pytest.mark.parametrize("make", REPORTS[:4], ids=NAMES[:4])
def test_memory_snapshot_is_highest_at_the_predicted_peak(make: Any, tmp_path: Path):
    report = make()
    found = snapshot_of(report, tmp_path)
    (events,), (segment,) = found["device_traces"], found["segments"]
    levels = replay(events)
    assert max(levels) == report.totals.peak_bytes
    assert levels[-1] == segment["allocated_size"] == sum(r.footprint.gradients for r in report.regions)
    assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"] >= max(levels)
    addresses = [b["address"] for b in segment["blocks"]]
    assert addresses == [segment["address"] + sum(b["size"] for b in segment["blocks"][:i]) for i in range(len(addresses))]


def test_allocations_of_a_snapshot_name_tensor_operator_module_and_pass(tmp_path: Path):
    (events,) = snapshot_of(of_a_transformer(), tmp_path)["device_traces"]
    frames = {(e["frames"][0]["filename"], e["frames"][0]["name"], e["frames"][1]["name"]) for e in events}
    assert ("blocks.0.up.weight", "gradient of (aten.mm.default)", "backward of region 0") in frames
    assert any(where.startswith("forward") and module == "blocks.0" for module, _, where in frames)
    lasts = [e["action"] for e in events if e["frames"][0]["name"].startswith("attention")]
    assert lasts.count("alloc") == lasts.count("free_completed") > 0


def test_lifetimes_of_what_is_not_small_are_the_curve():
    """Beside them there are only small tensors, and what a kernel needs beside its results (attention's, on a CPU)."""
    (region,) = in_few_bits().regions
    assert region.curves is not None
    lives, plan = region.curves.lifetimes, region.curves.plan
    counts = {0: (lives.forward_steps, plan.forward), lives.forward_steps: (lives.backward_steps, plan.backward)}
    for first, (count, levels) in counts.items():
        assert count <= POINTS
        for (step, _), level in zip(stretches(count), levels, strict=True):
            at = first + step
            listed = sum(t.nbytes for t in lives.tensors if t.start <= at and (t.end is None or t.end > at))
            assert 0 <= level - listed <= 16 * lives.least_bytes
    crossing = [t for t in lives.tensors if t.end is not None and t.start < lives.forward_steps < t.end]
    assert any("in int8" in t.what for t in crossing)
    assert sum(t.nbytes for t in crossing) == pytest.approx(region.totals.saved_bytes, rel=0.01)


@pytest.mark.slow
def test_torchs_own_tools_read_the_snapshot(tmp_path: Path):
    report = of_a_transformer()
    found = snapshot_of(report, tmp_path)
    assert "segments: 1" in memory_viz.segsum(found)
    assert "del" in memory_viz.trace(found)
    lines = []
    memory_viz.memory(found, lambda text: lines.append(text))
    assert "gradient of" in lines[0]
    command = [sys.executable, "-m", "torch.cuda._memory_viz", "trace_plot", "new/step.pickle", "-o", "step.html"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert "snapshot.pickle" in (tmp_path / "step.html").read_text()


def test_snapshot_without_a_prediction_says_what_is_missing(tmp_path: Path):
    with pytest.raises(actpass.ReportError, match="save_memory_snapshot: nothing to draw, because not yet"):
        Report((), "not yet").save_memory_snapshot(tmp_path / "step.pickle")
    assert not list(tmp_path.iterdir())


TRACED = """
import torch, actpass
from tests.helpers import eager_actcomp
from tests.models import mlp
model, inputs = mlp()
torch.compile(model, backend=eager_actcomp())(**inputs).backward()
print(actpass.report(model))
"""


@pytest.mark.slow
def test_trace_has_the_table_and_the_plan_of_each_region(tmp_path: Path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", TRACED], env=environment, check=True, capture_output=True, text=True)
    (log,) = tmp_path.glob("*.log")
    entries = re.split(r"^V\S* .*?(?=\{)", log.read_text(), flags=re.MULTILINE)
    payloads = {}
    for entry in entries[1:]:
        head, _, payload = entry.partition("\n")
        name = json.loads(head).get("artifact", {}).get("name", "")
        if name.startswith("actpass"):
            assert name not in payloads
            payloads[name] = "\n".join(line.removeprefix("\t") for line in payload.splitlines())
    assert payloads.keys() == {"actpass_report", "actpass_plan"}
    assert payloads["actpass_report"].splitlines()[-1] == done.stdout.splitlines()[-1]
    (tmp_path / "plan.json").write_text(payloads["actpass_plan"])
    assert actpass.ModelPlan.load(tmp_path / "plan.json").regions


def test_without_a_trace_nothing_is_made_for_it(monkeypatch: pytest.MonkeyPatch):
    def fail(_: Report) -> str:
        raise AssertionError("made in vain")

    monkeypatch.setattr(Report, "__str__", fail)
    monkeypatch.setattr(Report, "plan", property(fail))
    assert in_two_regions().active

"""What the pass decides and what it makes of graphs, against files that were looked at: a change of one is a change to review.

    pytest tests/test_golden.py --update-golden     # write them anew, then read the diff

They were made with one version of torch and of transformers, whose graphs they are: with others they are not compared.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn

import actpass
from actpass.diagnostics.explain import Explanation, explain_model
from actpass.pipeline import PASSES, compile_joint, until

from . import models

FOLDER = Path(__file__).parent / "golden"
VERSIONS = {"torch": torch.__version__.split("+")[0].rpartition(".")[0], "transformers": transformers.__version__}
PLANS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"policy": "exact"},
    "int4": {"codec": "int4"},
    "haar": {"projection": "haar", "skip_unprofitable": False},
    "prac": {"projection": "prac", "skip_unprofitable": False},
    "budget 0.7": {"memory_budget": 0.7},
    "budget 0.45": {"memory_budget": 0.45},
    "low rank": {"projection": "haar", "weight_gradient_format": "low_rank"},
}
SMALLEST = {"min_tensor_bytes": 1024}
MODELS = ("mlp", "transformer", "unfused_masked", "llama", "bert", "t5", "mixtral", "vit")
TOYS = ("mlp", "transformer")


class Golden:
    """A JSON file of one golden text an entry, and the versions that it was made with."""

    def __init__(self, path: Path, update: bool) -> None:
        self.path, self.update = path, update
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def check(self, name: str, lines: list[str]) -> None:
        """Compare ``lines`` with the entry ``name``, or write it."""
        if self.update:
            entries = self.known.get("entries", {}) if self.known.get("versions") == VERSIONS else {}
            self.known = {"versions": VERSIONS, "entries": {**entries, name: lines}}
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
            return
        if self.known and self.known["versions"] != VERSIONS:
            pytest.skip(f"{self.path.name} was made with {self.known['versions']}, and this is {VERSIONS}")
        assert self.known, f"{self.path} is not there: run with --update-golden"
        assert lines == self.known["entries"][name], f"{self.path.name}, {name!r}: see --update-golden in this file"


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")


def explained(model: str, options: Mapping[str, Any]) -> Explanation:
    module, inputs = getattr(models, model)()
    with warnings.catch_warnings():
        warnings.simplefilter("error", actpass.ActpassWarning)
        return explain_model(module, (), inputs, {**SMALLEST, **options})


def plan_lines(explanation: Explanation) -> Iterator[str]:
    """The plan, a tensor or a decision a line."""
    for region in explanation.report.plan.to_dict()["regions"]:
        for key, value in region.items():
            rows = value if isinstance(value, list) else [value]
            yield from (f"{key}: {_told(row)}" for row in rows)
    for record in explanation.report.regions:
        t = record.totals
        yield f"bytes: {t.saved_bytes_default} by Inductor, {t.saved_bytes} by the plan, {t.peak_bytes} at the peak"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another CPU's attention is another operator")
@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("model", [pytest.param(m, marks=() if m in TOYS else pytest.mark.architectures) for m in MODELS])
def test_plans_are_those_that_were_looked_at(model: str, options: str, update: bool):
    found = list(plan_lines(explained(model, PLANS[options])))
    Golden(FOLDER / f"plan-{model}.json", update).check(options, found)


def _told(row: Any) -> str:
    """``row`` without what is empty or off."""
    return ", ".join(f"{k} {v}" for k, v in row.items() if v or v == 0) if isinstance(row, dict) else json.dumps(row)


def graph_lines(gm: fx.GraphModule) -> Iterator[str]:
    """A node a line: its name, operator and arguments; the graphs that it calls behind it."""
    for node in gm.graph.nodes:
        given = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        yield f"{node.name} = {str(node.target).removeprefix('aten.')}({given})" if node.op != "placeholder" else node.name
    for name, called in gm.named_children():
        if isinstance(called, fx.GraphModule):
            yield from (f"  {name}: {line}" for line in graph_lines(called))


GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "codes": ("mlp", {"codec": "int8"}),
    "projected in the forward": ("mlp", {"projection": "haar", "skip_unprofitable": False}),
    "low-rank gradients": ("mlp", {"projection": "haar", "weight_gradient_format": "low_rank"}),
    "decoded from projections": ("mlp", {"projection": "prac", "skip_unprofitable": False}),
    "run again": ("mlp", {"memory_budget": 0.3}),
    "loss in pieces": ("classifier", {"chunked_loss": 16}),
}


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_every_stage_are_those_that_were_looked_at(name: str, update: bool):
    model, options = GRAPHS[name]
    (region,) = explained(model, options).regions
    stages = {stage.name: stage.graphs for stage in region.stages}
    shown = {"joint": stages["scatter_onto_sums"]["joint"], "rewritten": stages["batch_weight_gradients"]["joint"]}
    shown |= {"forward": region.forward, "backward": region.backward}
    lines = [f"{stage}: {line}" for stage, gm in shown.items() for line in graph_lines(gm)]
    Golden(FOLDER / "graphs.json", update).check(name, lines)


class Toy(nn.Module):
    """Two layers, the first one's output flipped, a sine taken twice, and a buffer that is read and then written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        self.register_buffer("least", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h = torch.where(h > self.least, h.sin() + h.sin().flip(-1), h)
        self.least.add_(1)
        return self.b(h).square().mean()


class TiedToy(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.tanh(self.embedding(tokens)) @ self.embedding.weight.t()
        return nn.functional.cross_entropy(logits, tokens)


def toy() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Toy(), {"x": torch.randn(32, 8)}


def tied_toy() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return TiedToy(), {"tokens": torch.arange(32) % 20}


class WideToy(Toy):
    """Features and rows that a matmul in fp8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)


def wide_toy() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return WideToy(), {"x": torch.randn(32, 16)}


PROJECTED = {"projection": "haar", "rank": 2, "skip_unprofitable": False}
TOYS_OF_PASSES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sum_one_hots": (tied_toy, {}),
    "chunked_loss": (tied_toy, {"chunked_loss": 16}),
    "scatter_onto_sums": (tied_toy, {"chunked_loss": 16}),
    "project_weight_gradients": (toy, PROJECTED),
    "contract_from_codes": (wide_toy, {"wgrad": "fp8", "rounding": "nearest"}),
    "low_rank_gradients": (toy, {**PROJECTED, "weight_gradient_format": "low_rank"}),
    "batch_weight_gradients": (wide_toy, PROJECTED),
    "partition": (toy, PROJECTED),
    "project_saved": (toy, {"projection": "prac", "rank": 4, "skip_unprofitable": False}),
}
"""A toy that a pass changes, where another than a plain one does."""


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", [p.name for p in PASSES])
def test_what_each_pass_makes_of_a_graph_is_what_was_looked_at(name: str, update: bool):
    """The graphs before and after it; one that stays as it is would be no test."""
    make, options = TOYS_OF_PASSES.get(name, (toy, {"codec": "int8"}))
    module, inputs = make()
    (region,) = explain_model(module, (), inputs, {"min_tensor_bytes": 0, **options}).regions
    (at,) = [i for i, stage in enumerate(region.stages) if stage.name == name]
    before, after = (
        [f"{kind}: {line}" for kind, gm in stage.graphs.items() for line in graph_lines(gm)]
        for stage in region.stages[at - 1 : at + 1]
    )
    assert before != after
    lines = [f"before {line}" for line in before] + [f"after {line}" for line in after]
    Golden(FOLDER / "passes.json", update).check(name, lines)


@pytest.mark.slow
def test_passes_can_be_listed_filtered_timed_and_left_out():
    module, inputs = toy()
    (region,) = explain_model(module, (), inputs, {"min_tensor_bytes": 0}).regions
    names = [p.name for p in PASSES]
    assert [stage.name for stage in region.stages] == ["traced", *names]
    assert all(region.seconds[name] > 0 for name in names)
    start = replace(region.traced, joint=replace(region.traced.joint, gm=region.stages[0].graphs["joint"]), stages=())
    short = compile_joint(start, passes=until("partition"))
    assert [stage.name for stage in short.stages] == ["traced", *names[: names.index("partition") + 1]]
    assert short.record.totals.saved_bytes > region.record.totals.saved_bytes

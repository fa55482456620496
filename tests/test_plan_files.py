"""Plans as data: what comes out of one compilation goes into another and gives the same; edits are checked, never replaced."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.options import parse
from actpass.plan_file import ModelPlan
from actpass.runtime import regions
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import assert_equal, eager_actcomp, step

SMALL = {"min_tensor_bytes": 0}
PROJECTED = {"projection": "haar", "rank": 4, "skip_unprofitable": False}


class Tower(models.Block):
    """One transformer layer with a loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def tower() -> models.Made:
    torch.manual_seed(0)
    return Tower(), {"x": torch.randn(2, 16, 32, requires_grad=True)}


class Headed(nn.Module):
    """A head whose logits weigh, so that the loss is formed in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 400)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(F.gelu(self.body(x))), labels)


def headed() -> models.Made:
    torch.manual_seed(0)
    return Headed(), {"x": torch.randn(1024, 16), "labels": torch.randint(400, (1024,))}


def explain(build: Callable[[], models.Made], **options: Any) -> Any:
    torch.compiler.reset()
    model, inputs = build()
    return actpass.explain(model, options=options, **inputs)


def edited(plan: ModelPlan, edit: Callable[[dict[str, Any]], Any], folder: Path) -> Path:
    """The file of ``plan`` with its first region changed by ``edit``."""
    data = copy.deepcopy(plan.to_dict())
    edit(data["regions"][0])
    path = folder / "edited.json"
    path.write_text(json.dumps(data))
    return path


def storage(region: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    return next(s for s in region["storages"] if all(s[k] == v for k, v in wanted.items()))


CASES = {
    "auto": (tower, SMALL),
    "exact": (tower, {"policy": "exact"}),
    "as Inductor": (tower, {"memory_budget": 1.0}),
    "run again": (tower, {**SMALL, "memory_budget": 0.1}),
    "projected": (models.mlp, PROJECTED),
    "projected and coded": (models.mlp, {**PROJECTED, **SMALL, "codec": "int8"}),
    "by name": (tower, {**SMALL, "codec": "int4", "module_overrides": {"q": "int8"}}),
    "loss in pieces": (headed, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_plan_from_a_file_gives_the_same_plan_and_the_same_bytes(case: str, tmp_path: Path):
    build, options = CASES[case]
    first = explain(build, **options)
    first.plan.save(tmp_path / "plan.json")
    loaded = ModelPlan.load(tmp_path / "plan.json")
    assert loaded == first.plan
    assert not loaded.edited
    again = explain(build, plan=tmp_path / "plan.json")
    assert again.plan_hash == again.plan.hash == loaded.hash
    assert again.totals == first.totals
    assert again.regions[0].options == "plan"
    assert again.plan.diff(first.plan) == "the plans are the same"
    does = {
        "run again": "recompute",
        "loss in pieces": "chunk_rows",
        "projected": "projections",
        "auto": "coded",
        "by name": "coded",
    }
    assert case not in does or getattr(loaded.regions[0], does[case])


@pytest.mark.slow
def test_gradients_under_a_given_plan_are_those_under_the_options_that_made_it():
    options = {**SMALL, "codec": "int8"}
    model, inputs = tower()
    want = step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)
    plan = actpass.report(model).plan
    torch.compiler.reset()
    STEP_COUNTER.calls = 0  # the first call of the step again
    model, inputs = tower()
    got = step(torch.compile(model, backend=eager_actcomp(plan=plan)), model, inputs)
    assert torch.equal(got[0], want[0])
    assert_equal(got[1], want[1])


@pytest.fixture(scope="module")
def auto() -> ModelPlan:
    return explain(tower, **SMALL).plan


@pytest.mark.slow
def test_a_changed_codec_is_followed_its_bytes_recomputed_and_the_difference_told(auto: ModelPlan, tmp_path: Path):
    def to_int4(region: dict[str, Any]) -> None:
        storage(region, module="gate")["codec"] = "int4"

    path = edited(auto, to_int4, tmp_path)
    assert ModelPlan.load(path).edited
    report = explain(tower, plan=path)
    (before,), (after,) = ([s for s in p.regions[0].storages if s.module == "gate"] for p in (auto, report.plan))
    assert (before.codec, after.codec) == ("int8", "int4")
    assert after.stored_bytes < 0.6 * before.stored_bytes
    assert report.plan_hash == ModelPlan.load(path).hash != auto.hash
    stored = sum(s.stored_bytes for s in report.plan.regions[0].storages)
    text = auto.diff(report.plan).splitlines()
    assert any("gate" in line and "int8 nearest" in line and "int4 nearest" in line for line in text)
    assert any(line.startswith("stored: ") and f"{stored / 1e3:.1f} kB" in line for line in text)
    assert "edited by hand" in auto.diff(ModelPlan.load(path))


def test_a_dropped_entry_is_stored_as_it_is(auto: ModelPlan, tmp_path: Path):
    path = edited(auto, lambda r: r["storages"].remove(storage(r, module="up")), tmp_path)
    (after,) = (s for s in explain(tower, plan=path).plan.regions[0].storages if s.module == "up")
    assert (after.codec, after.stored_bytes) == ("save", after.nbytes)
    assert "the plan does not name it" in after.reason


@pytest.mark.slow
def test_a_dropped_name_is_not_run_again_and_an_added_one_is(tmp_path: Path):
    tight = explain(tower, **SMALL, memory_budget=0.1)
    matmul = next(n for n, module in tight.plan.regions[0].modules if module == "up")
    fewer = explain(tower, plan=edited(tight.plan, lambda r: r["recompute"].remove(matmul), tmp_path))
    assert fewer.totals.extra_matmuls == tight.totals.extra_matmuls - 1
    assert f"no longer recomputed: up ({matmul})" in tight.plan.diff(fewer.plan)
    back = explain(tower, plan=edited(fewer.plan, lambda r: r["recompute"].append(matmul), tmp_path))
    assert back.totals.extra_matmuls == tight.totals.extra_matmuls
    assert any(f"the backward runs {matmul} again" in note for note in back.regions[0].notes)


def test_a_changed_rank_is_followed(tmp_path: Path):
    plan = explain(models.mlp, **PROJECTED).plan

    def rank(region: dict[str, Any]) -> None:
        region["decisions"][0].update(rank=7)

    report = explain(models.mlp, plan=edited(plan, rank, tmp_path))
    assert [d.rank for d in report.plan.regions[0].decisions] == [7, *(d.rank for d in plan.regions[0].decisions[1:])]
    assert {s.rank for s in report.regions[0].sites if s.projection} == {4, 7}


def wrong(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda region: region["storages"][0].update(changes)


def drop(region: dict[str, Any]) -> None:
    del region["storages"][0]["codec"]


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "codec": (wrong(codec="int7"), r"regions\[0\].storages\[0\].codec is 'int7'. Allowed: save, .*int8"),
    "rounding": (wrong(rounding="up"), r"rounding is 'up'. Allowed: stochastic, nearest"),
    "type": (wrong(nbytes="many"), r"storages\[0\].nbytes is 'many'. Allowed: an int"),
    "bool for int": (wrong(nbytes=True), r"nbytes is True"),
    "group": (wrong(group_size=3), r"group_size is 3. Allowed: an int in \[8, 4096\]"),
    "flag": (wrong(hadamard_rotation=0), r"hadamard_rotation is 0. Allowed: true or false"),
    "unknown field": (wrong(codek="int8"), r"storages\[0\] has an unknown field 'codek'. Did you mean 'codec'"),
    "missing field": (drop, r"storages\[0\] lacks the field 'codec'"),
    "again": (lambda r: r.update(recompute="mm"), r"regions\[0\].recompute is 'mm'. Allowed: a list"),
    "name": (lambda r: r.update(recompute=[3]), r"recompute\[0\] is 3. Allowed: a string"),
    "twice": (lambda r: r.update(must_save=["a", "a"]), r"must_save names 'a' twice"),
    "two entries": (
        lambda r: r["storages"].append(r["storages"][0]),
        r"is about the tensor .* as regions\[0\].storages\[0\] is",
    ),
    "method": (lambda r: r["decisions"][0].update(projection="svd"), r"decisions\[0\].projection is 'svd'. Allowed: gaussian"),
    "rank alone": (
        lambda r: r["decisions"][0].update(rank=4),
        r"decisions\[0\] is {.*'rank': 4.*projection, rank and project_in all null",
    ),
    "rank of zero": (lambda r: r["decisions"][0].update(rank=0), r"rank is 0. Allowed: an int in \[1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_field_is_named_with_its_value_and_what_is_allowed(case: str, auto: ModelPlan, tmp_path: Path):
    edit, message = MALFORMED[case]
    path = edited(auto, edit, tmp_path)
    with pytest.raises(actpass.PlanError, match=message):
        ModelPlan.load(path)
    with pytest.raises(actpass.PlanError, match=message):
        parse({"plan": str(path)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no schema_version"),
        (
            '{"schema_version": 99, "hash": "", "regions": []}',
            "schema_version is 99. Allowed: 3 .the fields of older files have other names",
        ),
        ('{"schema_version": 3, "hash": "", "regions": [], "regions": []}', "'regions' stands twice"),
        ('{"schema_version": 3, "hash": NaN, "regions": []}', "NaN is not a number of JSON"),
        ('{"schema_version": 3, "regions": []}', "lacks the field 'hash'"),
        ('{"schema_version": 3, "hash": "", "regions": {}}', r"regions is \{\}. Allowed: a list"),
    ],
)
def test_a_file_that_is_no_plan_says_why(text: str, message: str, tmp_path: Path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(actpass.PlanError, match=message):
        ModelPlan.load(tmp_path / "plan.json")


def test_a_file_that_is_not_there_and_a_value_that_is_no_plan_are_told(tmp_path: Path):
    with pytest.raises(actpass.PlanError, match=r"none\.json' can't be read: .*No such file"):
        ModelPlan.load(tmp_path / "none.json")
    with pytest.raises(actpass.PlanError, match=r"plan=3 is no plan. Allowed: actpass.report"):
        parse({"plan": 3})


@pytest.mark.parametrize(
    "option", [{"codec": "int8"}, {"min_tensor_bytes": 0}, {"module_overrides": {}}, {"chunked_loss": False}]
)
def test_an_option_that_the_plan_has_decided_is_refused(option: dict[str, Any], auto: ModelPlan):
    with pytest.raises(actpass.OptionError, match=f"{next(iter(option))}=.* can't be given beside a plan"):
        parse({"plan": auto, **option})


def first(storages: Iterable[dict[str, Any]], text: str) -> dict[str, Any]:
    return next(s for s in storages if text in s["reason"])


FORBIDDEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "statistic": (
        lambda r: first(r["storages"], "statistic of each row").update(codec="int8"),
        "in int8, which is not possible: a statistic",
    ),
    "query in 8 bits": (
        lambda r: storage(r, codec="int16").update(codec="int8"),
        "query or key .*logsumexp.*Allowed: save, int16",
    ),
    "unknown tensor": (lambda r: r["storages"][0].update(node="nothing"), "names 'nothing', which is not in the graph"),
    "not stored": (lambda r: storage(r, module="up").update(node="mul"), "'mul' in int8, but it does not cross"),
    "unknown again": (lambda r: r["recompute"].append("nothing"), "recompute names 'nothing', which is not in the graph"),
    "pointwise again": (lambda r: r["recompute"].append("mul"), "recompute names 'mul', which is aten.mul.*Allowed: matmuls"),
    "unknown keep": (lambda r: r["must_save"].append("nothing"), "must_save names 'nothing'"),
    "input kept": (
        lambda r: r["must_save"].append("primals_1"),
        "must_save names 'primals_1', which is no value that the forward computes",
    ),
    "no logits": (lambda r: r.update(chunk_rows=128), "forms the loss in chunks, which is not possible: no logits"),
    "other matmul": (lambda r: r["decisions"][0].update(matmuls=["mm"]), "names the matmul 'mm', which can't be projected"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_the_graph_does_not_allow_is_refused_with_the_reason(case: str, auto: ModelPlan, tmp_path: Path):
    edit, message = FORBIDDEN[case]
    with pytest.raises(actpass.PlanError, match=message):
        explain(tower, plan=edited(auto, edit, tmp_path))


@pytest.mark.slow
def test_a_query_is_coded_coarsely_only_by_name_or_with_its_attention_run_again(auto: ModelPlan, tmp_path: Path):
    report = explain(tower, plan=edited(auto, lambda r: storage(r, codec="int16").update(codec="int8", forced=True), tmp_path))
    assert any(s.codec == "int8" and s.forced for s in report.plan.regions[0].storages)
    tight = explain(tower, **SMALL, memory_budget=0.1).plan
    attention = next(n for n in tight.regions[0].recompute if "attention" in n)
    with pytest.raises(actpass.PlanError, match=f"makes the query or key .*without its attention {attention!r}"):
        explain(tower, plan=edited(tight, lambda r: r["recompute"].remove(attention), tmp_path))


@pytest.mark.slow
def test_scores_are_run_again_with_their_statistics_or_not_at_all(tmp_path: Path):
    plan = explain(models.unfused_masked, **SMALL, memory_budget=0.2).plan
    assert explain(models.unfused_masked, plan=edited(plan, lambda r: None, tmp_path)).plan_hash == plan.hash
    with pytest.raises(
        actpass.PlanError, match=r"recompute names .*bmm.* without .*amax.*Scores and their softmax's statistics"
    ):
        explain(models.unfused_masked, plan=edited(plan, lambda r: r["recompute"].remove("amax_1"), tmp_path))
    with pytest.raises(actpass.PlanError, match="recompute names 'mean'"):
        explain(models.unfused_masked, plan=edited(plan, lambda r: r["recompute"].append("mean"), tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 10**6}, r"rank 1000000. Allowed: an int in \[1, "),
        ({"project_in": "forward"}, "that frees nothing"),
        ({"site": "x"}, "'x'"),
    ],
)
def test_a_projection_that_can_not_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    plan = explain(models.mlp, **PROJECTED).plan
    with pytest.raises(actpass.PlanError, match=message):
        explain(models.mlp, plan=edited(plan, lambda r: r["decisions"][-1].update(changes), tmp_path))


def test_a_plan_for_other_shapes_is_refused_with_both(auto: ModelPlan):
    def longer() -> models.Made:
        model, _ = tower()
        return model, {"x": torch.randn(2, 24, 32, requires_grad=True)}

    with pytest.raises(actpass.PlanError, match=r"inputs \(float32\[2, 24, 32\]\).* have the inputs \(float32\[2, 16, 32\]\)"):
        explain(longer, plan=auto)


@pytest.mark.slow
def test_a_budget_beside_a_plan_holds_it_or_raises(auto: ModelPlan):
    assert explain(tower, plan=auto, memory_budget="1GiB").plan_hash == auto.hash
    with pytest.raises(actpass.BudgetError, match="does not hold the plan that is given, which needs") as raised:
        explain(tower, plan=auto, memory_budget=1000)
    least = raised.value.least
    assert least is not None
    assert explain(tower, plan=auto, memory_budget=least).plan_hash == auto.hash
    with pytest.raises(actpass.BudgetError, match="does not hold the plan"):
        explain(tower, plan=auto, memory_budget=least - 1)
    with pytest.raises(actpass.BudgetError, match="does not hold the plan that is given, which saves") as raised:
        explain(tower, plan=auto, memory_budget=0.01)
    assert raised.value.least is not None
    assert explain(tower, plan=auto, memory_budget=float(raised.value.least)).plan_hash == auto.hash


def test_a_plan_is_a_value_of_the_configuration(auto: ModelPlan):
    config = parse({"plan": auto})
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(parse({"plan": ModelPlan.of(auto.to_dict()["regions"])}))
    other = ModelPlan((replace(auto.regions[0], recompute=("mm",)),))
    assert repr(parse({"plan": other})) != repr(config)


def test_there_is_no_plan_before_anything_was_compiled():
    with pytest.raises(actpass.ReportError, match="there is no plan, because no training step"):
        _ = actpass.report(nn.Linear(2, 2)).plan


class Broken(nn.Module):
    """Two regions: a graph break between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = models.Block(), Tower()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        torch._dynamo.graph_break()
        return self.two(x)


def broken() -> models.Made:
    torch.manual_seed(0)
    return Broken(), {"x": torch.randn(2, 16, 32)}


def trained(**options: Any) -> actpass.Report:
    """The report after two steps of a model in two regions."""
    torch.compiler.reset()
    regions.clear()
    model, inputs = broken()
    compiled = torch.compile(model, backend=eager_actcomp(options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    actpass.set_optimizer(optimizer)
    for _ in range(2):
        try:
            compiled(**inputs).backward()
        except Exception as error:
            raise getattr(error, "inner_exception", error) from None
        optimizer.step()
        optimizer.zero_grad()
    return actpass.report(model)


@pytest.mark.slow
def test_a_plan_of_two_regions_finds_each_and_a_peak_budget_holds_them_together():
    plan = trained(**SMALL).plan
    assert len(plan.regions) == 2
    assert len({r.graph for r in plan.regions}) == 2
    assert trained(plan=ModelPlan(plan.regions[::-1])).plan_hash == plan.hash
    assert trained(plan=plan, memory_budget="1GiB").plan_hash == plan.hash
    budget, errors = 1000, []
    for _ in range(3):  # what the first region needs alone, then the second, then both
        with pytest.raises(actpass.BudgetError) as raised:
            trained(plan=plan, memory_budget=budget)
        errors.append(str(raised.value))
        assert raised.value.least is not None
        budget = int(raised.value.least)
        if "can't be met by the 2 regions of this step together" in errors[-1]:
            break
    assert "does not hold the plan that is given" in errors[0]
    assert "can't be met by the 2 regions of this step together" in errors[-1]
    assert trained(plan=plan, memory_budget=budget).plan_hash == plan.hash


CACHED = """
import json, sys, torch, actpass
from actpass.torch_compat import dynamo

def run(options):
    dynamo.utils.counters.clear()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 8))
    options["inductor_options"] = {"cpp.simdlen": 1}  # with VEC_ISA_OK: else a cold cache tries out this CPU, for ten seconds
    torch.compile(model, backend="actcomp", options=options)(torch.randn(20, 16)).sum().backward()
    counters = dynamo.utils.counters["aot_autograd"]
    report = actpass.report(model)
    print(json.dumps([counters["autograd_cache_hit"], counters["autograd_cache_miss"], report.plan.to_dict()]))

for options in sys.argv[1:]:
    run(json.loads(options))
"""


@pytest.mark.codegen
@pytest.mark.slow
def test_second_process_hits_the_cache_under_the_same_plan_and_an_edited_one_misses(tmp_path: Path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_VEC_ISA_OK": "1"}

    def process(*options: dict[str, Any]) -> list[Any]:
        command = [sys.executable, "-c", CACHED, *map(json.dumps, options)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True).stdout
        return [json.loads(line) for line in out.splitlines()]

    ((_, _, plan),) = process({**SMALL, "codec": "int8", "rounding": "nearest"})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    other = edited(ModelPlan.load(path), lambda r: storage(r, codec="int8").update(codec="int4"), tmp_path)
    ((*counts, followed),) = process({"plan": str(path)})
    assert counts == [0, 1]
    assert followed["hash"] == plan["hash"]
    hit, miss = process({"plan": str(path)}, {"plan": str(other)})
    assert hit == [1, 0, followed]
    assert miss[:2] == [0, 1]
    assert miss[2]["hash"] == ModelPlan.load(other).hash != plan["hash"]

"""``wgrad="fp8"``: weight gradients are matmuls of codes of 8 bits. What only a GPU proves is in test_gpu.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import actpass
from actpass.codecs import QUANTIZERS
from actpass.codecs.fp8_contraction import MULTIPLE, cast, codes_bytes, multiply, noise, scale_of
from actpass.codecs.generator import region_keys, step_seed
from actpass.diagnostics.explain import Explanation, explain_model
from actpass.errors import OptionError, PlanError
from actpass.options import parse
from actpass.passes.contract_from_codes import check_device
from actpass.reporting import Record
from actpass.torch_compat import FakeTensorMode

from .helpers import assert_close, assert_equal, eager_actcomp, error, step
from .tracing import JointGraph, trace

FP8 = {"policy": "exact", "wgrad": "fp8", "min_tensor_bytes": 0}
SCALED_MM = torch.ops.aten._scaled_mm.default
SEEDS = 256


class Net(nn.Module):
    """x of ``a`` is an input, that of ``b`` crosses for its weight alone, that of ``c`` and ``d`` is rebuilt for free."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, hidden, bias=False)
        self.c, self.d = nn.Linear(hidden, 16), nn.Linear(hidden, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.b(self.a(x)))
        return (self.c(h).square().mean() + self.d(h).tanh().mean()) * 100


def net(tokens: tuple[int, ...] = (4, 64)) -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(*tokens, 32)}


def explained(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Explanation:
    return explain_model(model, (), inputs, {**FP8, **options})


def only(explanation: Explanation) -> Record:
    (region,) = explanation.regions
    assert region.record.active, region.record.inactive_because
    return region.record


def ways(record: Record) -> dict[str, str]:
    """Parameter -> where its x is cast, or why it is not."""
    return {p: d["project_in"] or d["reason"] for d in record.plan["decisions"] for p in d["parameters"]}


def ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(got.double().mean() / want.double().mean())


def keys(seed: int) -> torch.Tensor:
    return region_keys(step_seed(0, seed), step_seed(1, seed), torch.device("cpu"))


# ---- codes


@pytest.mark.parametrize("by_row", [True, False])
def test_codes_are_the_tensor_in_expectation_with_the_variance_of_stochastic_rounding(by_row: bool):
    """Each element is one of the two neighbours that e4m3 has, at the odds of its place between them: variance (b - x)(x - a).
    Means of `SEEDS` draws lie within 6 standard errors; the variances' mean within 5 %."""
    torch.manual_seed(0)
    x = torch.randn(48, 64) * torch.logspace(-3, 3, 48).unsqueeze(1)
    scale = scale_of(x, by_row=by_row)
    assert scale.shape == ((48,) if by_row else ())
    drawn = [cast(x, scale, noise(keys(i), 48, 64, 7)) for i in range(SEEDS)]
    assert {c.dtype for c in drawn} == {torch.float8_e4m3fn}
    assert all(c.is_contiguous() and c.shape == (48, 1, 64) for c in drawn)
    values = torch.stack([c.squeeze(1).double() for c in drawn])
    steps = x.double() / scale.double().reshape(-1, 1)
    below, above = QUANTIZERS["float8_e4m3"].neighbours(steps)
    variance = (above - steps) * (steps - below)
    assert bool(((values - below).abs().minimum((values - above).abs()) < 1e-9).all())
    off = (values.mean(0) - steps) / (variance / SEEDS).sqrt().clamp_min(1e-6)
    assert float(off.abs().max()) < 6
    assert abs(ratio((values - steps).square(), variance) - 1) < 0.05


def test_codes_to_nearest_are_torchs_own_cast():
    x = torch.randn(32, 48)
    scale = scale_of(x, by_row=True)
    assert torch.equal(cast(x, scale, ()).squeeze(1).float(), (x / scale.unsqueeze(1)).to(torch.float8_e4m3fn).float())
    assert float((x / scale.unsqueeze(1)).abs().max()) <= 448 / 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products_of_codes_are_those_of_their_values(dtype: torch.dtype):
    by_row = dtype == torch.bfloat16
    a, b = torch.randn(48, 160), torch.randn(32, 160)
    pairs = [(cast(t, s, ()), s) for t in (a, b) for s in [scale_of(t, by_row=by_row)]]
    got = multiply(*pairs[0], *pairs[1], dtype)
    values = [c.squeeze(1).double() * s.double().reshape(-1, 1) for c, s in pairs]
    assert got.dtype == dtype
    assert error(got, values[0] @ values[1].t()) < {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpus_matmul_takes_codes_and_scales_as_they_are_made(dtype: torch.dtype):
    """By what torch checks of tensors on a CUDA device: factors in order, sizes, scales."""
    with FakeTensorMode():
        pairs: list[torch.Tensor] = []
        for features in (32, 48):
            t = torch.empty(64, features).t()
            scale = scale_of(t, by_row=dtype == torch.bfloat16)
            pairs += [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") for a in (cast(t, scale, ()), scale)
            ]
        made = multiply(*pairs, dtype)
        assert (made.shape, made.dtype, made.device.type) == ((32, 48), dtype, "cuda")
        codes, one = pairs[0].squeeze(1), torch.ones((), device="cuda")
        with pytest.raises(RuntimeError, match="row_major"):
            torch.ops.aten._scaled_mm(codes.t(), codes, one, one, None, None, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float):
    x, y = torch.randn(16, 32), torch.randn(16, 32)
    x[3, 5] = bad
    scales = [scale_of(t, by_row=True) for t in (x, y)]
    got = multiply(cast(x, scales[0], ()), scales[0], cast(y, scales[1], ()), scales[1], torch.bfloat16)
    assert not bool(got[3].isfinite().any())
    assert bool(got[[0, 1, 2, 4]].isfinite().all())


# ---- gradients


def traced() -> JointGraph:
    return trace(*net())


@pytest.mark.slow
def test_gradients_are_unbiased_and_as_far_off_as_the_codes_say():
    """Over `SEEDS` steps each mean lies within 6 standard errors. One step is off by 2 x the codes' 0.0014 (a mean over the
    binade of ulp^2 / 6) in the square where products do not cancel: a tenth at most here."""
    graph = traced()
    exact, fp8 = (graph.compiled(**{**FP8, "wgrad": w}) for w in (None, "fp8"))
    want = graph.run(exact.forward, exact.backward).gradients
    runs = [graph.run(fp8.forward, fp8.backward, seed).gradients for seed in range(SEEDS)]
    weights = [name for name in want if name.endswith("weight")]
    assert len(weights) == 4
    for name in weights:
        found = torch.stack([r[name].double() for r in runs])
        off = (found.mean(0) - want[name]) / (found.std(0) / SEEDS**0.5)
        assert float(off.abs().max()) < 6, name
        assert 0.005 < error(found[0], want[name]) < 0.15, name
        assert not torch.equal(found[0], found[1])


def test_only_weight_gradients_change():
    graph = traced()
    exact, fp8 = (graph.compiled(**{**FP8, "wgrad": w}) for w in (None, "fp8"))
    a, b = graph.run(exact.forward, exact.backward), graph.run(fp8.forward, fp8.backward)
    assert_equal(dict(enumerate(b.results)), dict(enumerate(a.results)))
    others = [n for n in a.gradients if not n.endswith("weight")]
    assert others
    assert_equal({n: b.gradients[n] for n in others}, {n: a.gradients[n] for n in others})


def test_gradients_to_nearest_are_products_of_hand_made_codes():
    """x and dy are known, and each is cast by torch: fp32 gradients have one scale for each tensor."""
    torch.manual_seed(0)
    layer, x, g = nn.Linear(48, 32), torch.randn(64, 48), torch.randn(64, 32)
    inputs = {"input": x}
    model = Weighted(layer, g)
    _, gradients = step(torch.compile(model, backend=eager_actcomp(FP8, rounding="nearest")), model, inputs)

    def values(t: torch.Tensor) -> torch.Tensor:
        scale = t.abs().max() * (1.002 / 448)
        return (t / scale).to(torch.float8_e4m3fn).double() * scale.double()

    assert error(gradients["layer.weight"], values(g).t() @ values(x)) < 1e-6
    assert error(gradients["layer.weight"], g.double().t() @ x.double()) > 0.01
    assert torch.equal(gradients["layer.bias"], g.sum(0))


class Weighted(nn.Module):
    """A loss whose gradient in what ``layer`` returns is ``g``."""

    def __init__(self, layer: nn.Module, g: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("g", g)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (self.layer(input) * self.g).sum()


def test_under_autocast_each_feature_has_a_scale_and_gradients_are_bfloat16():
    """A feature of x 1000 times as large as the others does not drown them."""
    torch.manual_seed(0)
    big = torch.ones(48)
    big[7] = 1e4
    layer, x, g = nn.Linear(48, 32, bias=False), torch.randn(4, 32, 48) * big, torch.randn(4, 32, 32)
    model, inputs = Weighted(layer, g), {"input": x}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = only(explained(model, inputs))
        _, exact = step(torch.compile(model, backend=eager_actcomp(policy="exact")), model, inputs)
        torch.compiler.reset()
        _, got = step(torch.compile(model, backend=eager_actcomp(FP8)), model, inputs)
    assert ways(record) == {"layer.weight": "forward"}  # the bfloat16 copy of x was stored
    small = [i for i in range(48) if i != 7]
    assert error(got["layer.weight"][:, small], exact["layer.weight"][:, small]) < 0.1


@pytest.mark.codegen
def test_a_compiled_step_has_the_gradients_of_an_interpreted_one():
    """To nearest, where sums in another order may move a value over a rounding boundary; and near the exact ones if rounded
    stochastically."""
    model, inputs = net()
    _, exact = step(model, model, inputs)
    found = []
    for rounding in ("nearest", "stochastic"):
        options = {**FP8, "rounding": rounding}
        for how in ({"backend": eager_actcomp(options)}, {"backend": "actcomp", "options": options}):
            torch.compiler.reset()
            found.append(step(torch.compile(model, **how), model, inputs))
    assert all(error(loss, found[0][0]) < 1e-6 for loss, _ in found)
    assert_close(found[1][1], found[0][1], 0.005)
    for _, gradients in found:
        assert_close(gradients, exact, 0.1)


@pytest.mark.codegen
@pytest.mark.parametrize("autocast", [False, True])
def test_generated_code_multiplies_codes_with_tokens_contiguous_in_both_factors(autocast: bool):
    """What a CPU's matmul takes in any order, a GPU's takes in this one."""
    model, inputs = net()
    compiled = torch.compile(model, backend="actcomp", options=dict(FP8))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, codes = run_and_get_code(lambda: step(compiled, model, inputs))
    calls = re.findall(r"extern_kernels\._scaled_mm\((.*), out_dtype", "\n".join(codes))
    made = r"reinterpret_tensor\(\w+, \(%s\), \(%s\), 0\)"
    left, right = made % (r"\d+, 256", "256, 1"), made % (r"256, \d+", "1, 256")
    assert len(calls) == 4
    assert all(re.match(rf"{left}, ({right}|permute_\d+), ", call) for call in calls), calls  # or what was saved


# ---- what is stored


@pytest.mark.slow
def test_x_crosses_as_codes_where_nothing_else_needs_it_and_is_cast_in_the_backward_elsewhere():
    model, inputs = net()
    record = only(explained(model, inputs))
    assert ways(record) == {
        "a.weight": "backward", "b.weight": "forward", "c.weight": "backward", "d.weight": "backward",
    }  # fmt: skip
    rows = {p: s for s in record.sites for p in s.parameters}
    assert {s.wgrad for s in rows.values()} == {"fp8"}
    stored = rows["b.weight"]
    assert (stored.form, stored.codec, stored.unbiased) == ("quantize", "float8_e4m3", True)
    assert stored.bytes_after == codes_bytes(48, 256, by_row=False) == 48 * 256 + 4
    assert "fp8" in str(explained(model, inputs).report)


@pytest.mark.slow
def test_the_bytes_of_the_report_are_those_that_cross():
    graph = traced()
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            graph = trace(*net())
            compiled = graph.compiled(**FP8)
            run = graph.run(compiled.forward, compiled.backward)
        rows = sum(s.bytes_after for s in compiled.record.sites)
        assert rows == compiled.record.totals.saved_bytes
        assert rows == run.kept
        by_row = dtype is not None
        (stored,) = [s for s in compiled.record.sites if "b.weight" in s.parameters]
        assert stored.bytes_after == codes_bytes(48, 256, by_row=by_row)


def test_under_inductors_own_cut_codes_are_stored_for_all_that_it_saves_for_weights():
    model, inputs = net()
    record = only(explained(model, inputs, memory_budget=1.0))
    assert ways(record) == {"a.weight": "backward", **dict.fromkeys(("b.weight", "c.weight", "d.weight"), "forward")}


def test_one_cast_of_x_serves_all_that_read_it_and_nothing_decodes_it():
    graph = traced()
    compiled = graph.compiled(**FP8)
    backward = compiled.backward.graph
    products = backward.find_nodes(op="call_function", target=SCALED_MM)
    assert len(products) == 4
    made = [a for n in backward.nodes for a in [n.meta.get("val")] if n.op == "call_function"]
    fp8 = [n for n in backward.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.float8_e4m3fn]
    assert made
    for node in fp8:  # codes only move, and enter a product
        for user in node.users:
            assert user in fp8 or user in products, user
    casts = [n for n in backward.nodes if n.args[1:] == (torch.float8_e4m3fn,)]
    assert len(casts) == 2 + 4  # of x: the input, and what c and d read; of dy: each


def test_one_cast_of_dy_serves_all_that_read_it():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 48, bias=False), nn.Linear(16, 48, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.a(x) + self.b(y)).square().mean()

    graph = trace(Sum(), {"x": torch.randn(64, 32), "y": torch.randn(64, 16)})
    backward = graph.compiled(**FP8).backward.graph
    assert len(backward.find_nodes(op="call_function", target=SCALED_MM)) == 2
    assert len([n for n in backward.nodes if n.args[1:] == (torch.float8_e4m3fn,)]) == 3


@pytest.mark.slow
def test_codes_count_in_a_budget_as_what_they_are():
    """A fraction that the codes and what else crosses just fit leaves all as it is; below it something is recomputed, and
    no budget is exceeded."""
    model, inputs = net()
    totals, seed = only(explained(model, inputs)).totals, 40
    least = (totals.saved_bytes - seed) / totals.saved_bytes_default
    for fraction in (least + 1e-6, least - 0.01, least / 2):
        met = only(explained(model, inputs, memory_budget=fraction))
        assert met.totals.saved_bytes - seed <= fraction * totals.saved_bytes_default
        assert (met.totals.saved_bytes == totals.saved_bytes) == (fraction > least)


@pytest.mark.slow
def test_policies_store_the_rest():
    model, inputs = net()
    record = only(explained(model, inputs, policy="auto"))
    codecs = {s.codec for s in record.sites if s.form == "quantize"}
    assert codecs == {"float8_e4m3", "int8"}
    alone = only(explained(model, inputs, policy="auto", wgrad=None))
    of = [{s.name: s.stored_as for s in r.sites if "weight" not in str(s.parameters)} for r in (record, alone)]
    assert {n: f for n, f in of[0].items() if n in of[1]}.items() <= of[1].items()


# ---- what is left exact, and why


class Module(nn.Module):
    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x).square().mean()


@pytest.mark.parametrize(("tokens", "width", "out"), [(60, 32, 32), (64, 24, 32), (64, 32, 40)])
def test_sizes_that_a_matmul_in_fp8_does_not_take_are_left_exact(tokens: int, width: int, out: int):
    model = Module(lambda m, x: m.a(x.exp()), a=nn.Linear(width, out))
    record = only(explained(model, {"x": torch.randn(tokens, width)}))
    (reason,) = ways(record).values()
    odd = next(n for n in (tokens, width, out) if n % MULTIPLE)
    assert f"not in fp8: {odd} is no multiple of {MULTIPLE}" in reason
    assert reason in str(explained(model, {"x": torch.randn(tokens, width)}).report)


def test_batched_weights_and_float64_are_left_exact():
    w = nn.Parameter(torch.randn(4, 32, 48))
    record = only(explained(Module(lambda m, x: torch.bmm(x.exp(), m.w), w=w), {"x": torch.randn(4, 64, 32)}))
    assert "not in fp8: batched" in ways(record)["w"]
    model = Module(lambda m, x: m.a(x.exp()), a=nn.Linear(32, 32)).double()
    record = only(explained(model, {"x": torch.randn(64, 32).double()}))
    assert "not in fp8: a factor of float64" in ways(record)["a.weight"]


def test_sizes_that_change_from_call_to_call_are_left_exact():
    model = Module(lambda m, x: m.a(x.exp()), a=nn.Linear(32, 32))
    compiled = torch.compile(model, backend=eager_actcomp(FP8), dynamic=True)
    step(compiled, model, {"x": torch.randn(64, 32)})
    (region,) = actpass.report(model).regions
    assert "not in fp8: sizes that change" in ways(region)["a.weight"]


def test_an_adapters_narrow_factors_are_left_exact_unless_they_are_named():
    def adapted(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(F.gelu(m.a(x))) + m.up(m.down(x.exp()))

    parts = {"a": nn.Linear(256, 256), "b": nn.Linear(256, 256), "down": nn.Linear(256, 16), "up": nn.Linear(16, 256)}
    inputs = {"x": torch.randn(64, 256)}
    found = ways(only(explained(Module(adapted, **parts), inputs)))
    assert "narrow" in found["up.weight"]
    assert found["a.weight"] == "backward"
    found = ways(only(explained(Module(adapted, **parts), inputs, module_overrides={"up": {"wgrad": "fp8"}})))
    assert found["up.weight"] in ("forward", "backward")


@pytest.mark.slow
def test_weights_that_are_read_as_they_are_or_twice_are_formed_of_codes_too():
    """dWᵀ = xᵀ dy, x the first factor; and a gradient that is the sum of two products."""
    w = nn.Parameter(torch.randn(32, 48) * 0.1)
    twice = Module(lambda m, x: m.a(F.gelu(m.a(x.exp() @ m.w @ m.w.t()))), w=w, a=nn.Linear(32, 32))
    inputs = {"x": torch.randn(64, 32)}
    record = only(explained(twice, inputs))
    assert set(ways(record)) == {"w", "a.weight"}
    assert {d["wgrad"] for d in record.plan["decisions"]} == {"fp8"}
    graph = trace(twice, inputs)
    exact, fp8 = (graph.compiled(**{**FP8, "wgrad": way, "rounding": "nearest"}) for way in (None, "fp8"))
    assert len(fp8.backward.graph.find_nodes(op="call_function", target=SCALED_MM)) == 4
    want, got = (graph.run(c.forward, c.backward).gradients for c in (exact, fp8))
    assert_close({n: got[n] for n in ("w", "a.weight")}, {n: want[n] for n in ("w", "a.weight")}, 0.1)


# ---- options and plans


def test_options_say_what_is_wrong():
    with pytest.raises(OptionError, match=r"unknown wgrad 'fp16'.* Known: fp8"):
        parse({"wgrad": "fp16"})
    with pytest.raises(OptionError, match=r"wgrad='fp8' can't be given with projection='haar'"):
        parse({"wgrad": "fp8", "projection": "haar"})
    with pytest.raises(OptionError, match=r"in module_overrides\['mlp'\] can't be given with projection='haar'"):
        parse({"module_overrides": {"mlp": {"wgrad": "fp8", "projection": "haar"}}})


def test_an_override_names_one_way_to_form_a_weight_gradient():
    overrides = {"a": "haar", "b": {"wgrad": None}, "c": "save", "d": {"codec": "int8"}}
    config = parse({"wgrad": "fp8", "module_overrides": overrides})
    found = {name: (t.projection, t.wgrad) for name, t in config.module_overrides}
    assert found == {"a": ("haar", None), "b": (None, None), "c": (None, None), "d": (None, "fp8")}
    config = parse({"projection": "haar", "module_overrides": {"a": {"wgrad": "fp8"}}})
    assert [(t.projection, t.wgrad) for _, t in config.module_overrides] == [(None, "fp8")]


def test_a_projection_and_fp8_go_side_by_side():
    model, inputs = net()
    of_b = {"b": {"projection": "haar", "rank": 0.25}}
    record = only(explained(model, inputs, module_overrides=of_b, skip_unprofitable=False))
    rows = {p: (s.projection, s.wgrad) for s in record.sites for p in s.parameters}
    assert rows["b.weight"] == ("haar", None)
    assert rows["c.weight"] == (None, "fp8")


@pytest.mark.parametrize(("major", "minor"), [(8, 9), (7, 5)])
def test_a_device_without_fp8_matmuls_is_named_with_its_capability(major: int, minor: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    with pytest.raises(OptionError, match=rf"cuda:0, whose capability is {major}\.{minor}\. Allowed: .*9\.0"):
        check_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda:0"))
    check_device(torch.device("cpu"))
    with pytest.raises(OptionError, match="not possible on the device mps"):
        check_device(torch.device("mps"))


@pytest.mark.slow
def test_a_plan_file_says_the_same_again(tmp_path: Path):
    model, inputs = net()
    first = explained(model, inputs, policy="auto")
    path = tmp_path / "plan.json"
    first.report.plan.save(path)
    again = explain_model(model, (), inputs, {"plan": str(path)})
    assert only(again).plan_hash == only(first).plan_hash
    assert ways(only(again)) == ways(only(first))
    assert only(again).totals.saved_bytes == only(first).totals.saved_bytes
    others = [explained(model, inputs, policy="auto", **o) for o in ({"wgrad": None}, {"rounding": "nearest"})]
    assert len({only(e).plan_hash for e in (first, *others)}) == 3
    assert "fp8 (stochastic, cast in forward)" in first.report.plan.diff(others[0].report.plan)


def test_a_plan_that_asks_for_what_is_not_possible_is_refused(tmp_path: Path):
    model, inputs = net()
    text = (lambda p: (explained(model, inputs).report.plan.save(p), p.read_text())[1])(tmp_path / "a.json")
    edited = tmp_path / "b.json"
    edited.write_text(text.replace('"wgrad": "fp8"', '"wgrad": "fp4"', 1))
    with pytest.raises(PlanError, match=r"wgrad is 'fp4'. Allowed: fp8"):
        actpass.ModelPlan.load(edited)
    edited.write_text(text.replace('"rounding": "stochastic"', '"rounding": null', 1))
    with pytest.raises(PlanError, match="wgrad, rounding and project_in"):
        actpass.ModelPlan.load(edited)
    edited.write_text(text.replace('"project_in": "backward"', '"project_in": "forward"', 1))
    with pytest.raises(PlanError, match="frees nothing"):
        explain_model(model, (), inputs, {"plan": str(edited)})


def test_an_audit_says_how_far_off_it_is():
    model, inputs = net()
    audit = actpass.audit(model, inputs, options=FP8)
    assert "weight" in str(audit)

"""A package that adds a codec, a policy, a projection and an optimizer, one file each, and nothing in actpass for them
(tests/plugin): each is found through its entry point and used end to end."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import actpass
from actpass import registry
from actpass.codecs import ALL_PROJECTIONS, QUANTIZERS
from actpass.errors import OptionError, PluginError, RegistryError
from actpass.ir.op_rules import OP_RULES
from actpass.memory.optimizer_state import state_to_come
from actpass.optim import OPTIMIZERS
from actpass.options import options_for
from actpass.plan import POLICIES
from actpass.reporting import Report
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import Grads, eager_actcomp, error, step

PROJECTION = "random_subset_of_coordinates"
ENTRY_POINTS = f"""
[actpass.codecs]
log8 = actpass_plugin.log8:Log8
[actpass.policies]
recompute_attention = actpass_plugin.recompute_attention
[actpass.projections]
{PROJECTION} = actpass_plugin.coordinates
[actpass.op_rules]
actpass_plugin.gate.default = actpass_plugin.gate
[actpass.optimizers]
lion = actpass_plugin.lion:Lion
"""
ALL = {"min_tensor_bytes": 0, "chunked_loss": False}


def installed(folder: Path, text: str) -> None:
    """A package's metadata, as pip writes them."""
    info = folder / "actpass_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: actpass-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text)
    importlib.invalidate_caches()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, with registries that forget what comes from there."""
    with ExitStack() as stack:
        for each in (QUANTIZERS, ALL_PROJECTIONS, POLICIES, OPTIMIZERS, OP_RULES):
            stack.enter_context(each.temporary())
        monkeypatch.syspath_prepend(str(tmp_path))
        yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "actpass_plugin"]:
        del sys.modules[name]


@pytest.fixture
def plugin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin"))
    installed(path, ENTRY_POINTS)


def explained(**options: Any) -> Report:
    model, inputs = models.transformer(layers=1)
    report = actpass.explain(model, options={**ALL, **options}, **inputs)
    assert report.active
    return report


def trained(**options: Any) -> tuple[torch.Tensor, Grads]:
    torch.compiler.reset()
    STEP_COUNTER.steps = 0
    model, inputs = models.transformer(layers=1)
    return step(torch.compile(model, backend=eager_actcomp(ALL, **options)), model, inputs)


def worst(got: Grads, want: Grads) -> float:
    return max(error(got[n], want[n]) for n in want if "in_proj_bias" not in n)


def forms_of(report: Report) -> set[str]:
    return {s["codec"] for region in report.regions for s in region.plan["storages"]} - {"save"}


def followed(report: Report, file: Path) -> Report:
    report.plan.save(file)
    model, inputs = models.transformer(layers=1)
    return actpass.explain(model, options={"plan": str(file)}, **inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("policy", ["recompute_attention", "exact"])
def test_other_budgets_are_explored_under_any_policy_that_has_a_choice(policy: str):
    model, inputs = models.transformer(layers=1)
    (region,) = actpass.explore(model, options={**ALL, "policy": policy}, **inputs).regions
    assert region.tradeoff is not None
    assert len({p.saved_bytes for p in region.tradeoff.ours}) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_codec_of_another_package_stores_saved_tensors(tmp_path: Path):
    exact_loss, exact = trained(policy="exact")
    loss, grads = trained(codec="log8")
    assert torch.equal(loss, exact_loss)
    assert 1e-5 < worst(grads, exact) < 0.2
    whole = explained(codec="log8")
    assert "log8" in forms_of(whole)
    assert forms_of(whole) <= {"log8", "int16"}  # queries and keys: log8 does not say that it is safe for them
    assert "log8" in str(whole)
    tight = explained(codec="log8", memory_budget=0.3)
    assert "log8" in forms_of(tight)
    assert tight.totals.saved_bytes <= 0.3 * tight.totals.saved_bytes_default
    assert followed(whole, tmp_path / "plan.json").plan.hash == whole.plan.hash
    model, inputs = models.transformer(layers=1)
    rows = actpass.calibrate(model, inputs, options=ALL).rows
    assert all("log8" in dict(r.errors) for r in rows)


@pytest.mark.usefixtures("plugin")
def test_codec_of_another_package_errs_as_it_says():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    from actpass.codecs.generator import round_keys, rounding_noise
    from actpass.passes.quantize_saved import layout_of

    codec, layout = QUANTIZERS["log8"], layout_of(x, "log8", None)
    assert layout is not None

    def through(noise: Any) -> torch.Tensor:
        return codec.decode(*codec.encode(x, layout.groups, noise), layout.groups, x.shape, x.dtype)

    err = float((through(None) - x).square().sum() / x.square().sum())
    assert codec.error / 2 < err < codec.error * 2
    draws = 64
    mean = sum(
        through(rounding_noise(round_keys(i), [layout.groups.rows, layout.groups.columns])) for i in range(draws)
    ) / draws  # fmt: skip
    left = float((mean - x).square().sum() / x.square().sum())
    assert left < 3 * codec.error / draws  # stochastic: twice the variance of nearest, and unbiased


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_policy_of_another_package_recomputes_attention(tmp_path: Path):
    exact_loss, exact = trained(policy="exact")
    loss, grads = trained(policy="recompute_attention")
    assert torch.equal(loss, exact_loss)
    assert worst(grads, exact) == 0  # nothing is stored inexactly
    plain, whole = explained(policy="exact"), explained(policy="recompute_attention")
    assert not any(r.plan["recompute"] for r in plain.regions)
    assert [n for r in whole.regions for n in r.plan["recompute"] if "attention" in n]
    assert whole.totals.saved_bytes < plain.totals.saved_bytes
    assert forms_of(whole) == set()
    tight = explained(policy="recompute_attention", memory_budget=0.4)
    assert tight.totals.saved_bytes <= 0.4 * tight.totals.saved_bytes_default
    assert [n for r in tight.regions for n in r.plan["recompute"] if "attention" in n]
    for report in (whole, tight):
        file = tmp_path / f"{id(report)}.json"
        assert followed(report, file).plan.hash == report.plan.hash
    kept = explained(module_overrides={"blocks.*": {"policy": "recompute_attention"}}, policy="exact")
    assert [n for r in kept.regions for n in r.plan["recompute"] if "attention" in n]


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_projection_of_another_package_forms_weight_gradients(tmp_path: Path):
    how: dict[str, Any] = {**options_for(PROJECTION), "rank": 0.5, "skip_unprofitable": False}
    exact_loss, exact = trained(policy="exact")
    loss, grads = trained(**how)
    assert torch.equal(loss, exact_loss)
    assert 0.1 < worst(grads, exact) < 3
    assert worst(trained(**{**how, "rank": 1.0})[1], exact) < 1e-5  # every coordinate once
    report = explained(**how)
    assert {d["projection"] for r in report.regions for d in r.plan["decisions"]} - {None} == {PROJECTION}
    assert followed(report, tmp_path / "plan.json").plan.hash == report.plan.hash
    budget = explained(**options_for(PROJECTION), rank="budget", memory_budget=0.9)
    assert budget.totals.saved_bytes <= 0.9 * budget.totals.saved_bytes_default


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_optimizer_of_another_package_steps_in_a_subspace_and_resumes(tmp_path: Path):
    """With a projection whose name is longer than 16 letters."""
    options = {**options_for(PROJECTION), "weight_gradient_format": "low_rank", "refresh_interval": 3, "rank": 0.5}

    def begin() -> tuple[Any, Any, Any, Any]:
        torch.compiler.reset()
        model, inputs = models.transformer(layers=1)
        return (
            model,
            inputs,
            OPTIMIZERS["lion"](model.parameters(), lr=1e-3),
            torch.compile(model, backend=eager_actcomp(options)),
        )

    def train(model: Any, inputs: Any, optimizer: Any, run: Any, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = run(**inputs)
            loss.backward()
            optimizer.step()
        return loss.item()

    STEP_COUNTER.steps = 0
    model, inputs, optimizer, run = begin()
    to_come = state_to_come(optimizer)
    assert to_come == sum(p.numel() * 4 + 4 for p in model.parameters())  # as it says itself
    first = train(model, inputs, optimizer, run, 1)
    train(model, inputs, optimizer, run, 3)
    torch.save((model.state_dict(), optimizer.state_dict(), actpass.state_dict(model)), tmp_path / "run.pt")
    assert train(model, inputs, optimizer, run, 4) < first
    want = {n: t.clone() for n, t in model.state_dict().items()}
    model, inputs, optimizer, run = begin()
    weights, state, own = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    actpass.load_state_dict(model, own)
    train(model, inputs, optimizer, run, 4)
    assert all(torch.equal(t, want[n]) for n, t in model.state_dict().items())


@pytest.mark.usefixtures("plugin")
def test_source_of_another_package_is_part_of_the_cache_key(path: Path, monkeypatch: pytest.MonkeyPatch):
    before = registry.foreign_sources()
    assert [line.split()[1] for line in before.splitlines()] == [
        "log8", PROJECTION, "actpass_plugin.gate.default", "recompute_attention", "lion",
    ]  # fmt: skip
    registry._hash_of.cache_clear()
    assert registry.foreign_sources() == before
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: real(p) + (b"#" if p.name == "log8.py" else b""))
    registry._hash_of.cache_clear()
    assert registry.foreign_sources() != before
    registry._hash_of.cache_clear()


def test_nothing_foreign_is_known_without_a_plugin():
    assert registry.foreign_sources() == ""


def test_broken_plugin_is_named(path: Path):
    (path / "actpass_plugin.py").write_text("raise RuntimeError('no such thing')\n")
    installed(path, "[actpass.codecs]\nbroken = actpass_plugin\n")
    for _ in range(2):  # and again: nothing is left half loaded
        with pytest.raises(PluginError, match=r"the codec 'broken' of actpass-plugin .*RuntimeError: no such thing"):
            QUANTIZERS["int8"]


def test_plugin_that_registers_nothing_is_named(path: Path):
    (path / "actpass_plugin.py").write_text("")
    installed(path, "[actpass.optimizers]\nidle = actpass_plugin\n")
    with pytest.raises(PluginError, match=r"'idle' of actpass-plugin .*has registered nothing"):
        list(OPTIMIZERS)


def test_name_that_is_taken_names_both_owners():
    codec = QUANTIZERS["int8"]
    with pytest.raises(RegistryError, match=r"codec 'int8' of somewhere .* one of actpass\.codecs\.quantizers\.integer"):
        QUANTIZERS.register("int8", codec, owner="somewhere")
    assert QUANTIZERS["int8"] is codec


def test_unknown_name_lists_the_known_ones_with_a_near_match():
    with pytest.raises(RegistryError, match=r"unknown codec 'int9'\. Did you mean 'int8'\? Known: .*int16, int8, int4"):
        QUANTIZERS["int9"]
    with pytest.raises(OptionError, match="unknown codec 'log8'"):
        explained(codec="log8")


def test_policy_that_recomputes_a_query_without_its_attention_is_refused():
    from actpass.plan import Facts, Policy, register_policy

    class Scores(Policy):
        recomputes = True

        def decide(self, facts: Facts) -> Any:
            again = [t.role == "score" and facts.can_recompute(t) for t in facts.tensors]
            return tuple(facts.recompute(t) if a else facts.save(t) for t, a in zip(facts.tensors, again, strict=True))

        def options(self, t: Any, request: Any, codecs: Any) -> Any:
            raise NotImplementedError

    with POLICIES.temporary():
        register_policy("scores")(Scores)
        with pytest.raises(PluginError, match=r"policy 'scores' recomputes the query or key .* without its attention"):
            explained(policy="scores")


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.ops.actpass_plugin.gate(self.a(x), self.b(x))).square().mean()


@pytest.mark.slow
def test_an_operator_with_a_row_is_read_by_it_and_one_without_is_left_alone(plugin: None):
    assert OP_RULES["actpass_plugin.gate.default"].linear == ((0,), (1,))
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(64, 16)

    def stored() -> dict[str, str]:
        torch.compiler.reset()
        report = actpass.explain(model, x, options={**ALL, "codec": "int8"})
        return {s["module"]: f"{s['codec']}: {s['reason']}" for region in report.regions for s in region.plan["storages"]}

    assert {stored()[name].partition(":")[0] for name in ("a", "b")} == {"int8"}
    row = OP_RULES._values.pop("actpass_plugin.gate.default")
    try:
        assert all("read by actpass_plugin.gate.default, which is not one of torch's own" in stored()[n] for n in ("a", "b"))
    finally:
        OP_RULES._values["actpass_plugin.gate.default"] = row

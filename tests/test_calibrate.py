"""What `actpass.calibrate` measures is what the codecs do, and budgets weigh by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import actpass
from actpass.codecs import QUANTIZERS
from actpass.diagnostics.calibrate import _Gradients, _rounded, _sample
from actpass.diagnostics.explain import explain_model
from actpass.ir.joint_graph import module_path
from actpass.options import options_for
from actpass.planner.region import Region

from . import models
from .helpers import Grads, eager_actcomp, step

OPTIONS = {"min_tensor_bytes": 0, "chunked_loss": False}
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def noise(got: Grads, want: Grads) -> float:
    """The squared relative error of all gradients together, preconditioned as `calibrate` does without an optimizer."""
    samples = tuple(_sample(i, g, None) for i, g in enumerate(want.values()))
    return _Gradients(samples).error(list(got.values()))


def gradients(build: models.Made, **options: object) -> Grads:
    model, inputs = build
    torch.compiler.reset()
    return step(torch.compile(model, backend=eager_actcomp({**OPTIONS, **options})), model, inputs)[1]


@pytest.mark.slow
def test_errors_of_single_tensors_add_up_to_that_of_all_in_one_form():
    """Rounding errors of different tensors are independent, so their squares add; correlations are what is left over. In 8 bits
    the gradient is linear in them."""
    model, inputs = models.transformer(layers=3)
    calibration = actpass.calibrate(model, inputs, options=OPTIONS)
    want, got = (gradients((model, inputs), **options_for(m), rounding="nearest") for m in ("exact", "int8"))
    form = {True: "int16", False: "int8"}
    report = actpass.explain(model, options={**OPTIONS, "codec": "int8"}, **inputs)
    scores = {s["node"] for r in report.regions for s in r.plan["storages"] if s["codec"] == "int16"}
    predicted = sum(dict(r.errors)[form[r.node in scores]] * r.factor for r in calibration.rows)
    assert noise(got, want) == pytest.approx(predicted, rel=0.5)


def test_a_tensor_behind_which_gradients_are_large_is_more_sensitive():
    """Two frozen branches, of which one is scaled to a tenth: so is its part of the one gradient that there is, and a relative
    error there counts a hundredth."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.shared = nn.Linear(32, 32)
            self.large, self.small = (nn.Sequential(nn.Linear(32, 32), nn.Tanh()).requires_grad_(False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.shared(x)
            return self.large(h).sum() + 0.1 * self.small(h).sum()

    calibration = actpass.calibrate(Branches(), {"x": torch.randn(64, 32)}, options=OPTIONS)
    large, small = (next(r.factor for r in calibration.rows if r.module.startswith(name)) for name in ("large", "small"))
    assert 30 < large / small < 300


@pytest.mark.slow
def test_optimizer_state_preconditions_and_nothing_is_left_behind():
    model, inputs = models.transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, model, inputs)
    optimizer.step()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = actpass.calibrate(model, inputs, options=OPTIONS)
    adam = actpass.calibrate(model, inputs, options=OPTIONS, optimizer=optimizer)
    assert (plain.preconditioner, adam.preconditioner) == ("Adafactor, from the gradient of the batch", "Adam")
    assert [r.node for r in plain.rows] == [r.node for r in adam.rows]
    assert [r.factor for r in plain.rows] != [r.factor for r in adam.rows]
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_rounding_changes_every_view_of_one_memory_and_nothing_else():
    base = torch.randn(64, 32)
    args = [torch.randn(8), base, base.t(), base[:10], torch.randn(64, 32)]
    changed, error = _rounded(args, [1, 2, 3], "int4")
    assert 1e-3 < error < 3e-2
    assert torch.equal(changed[1], changed[2].t())
    assert torch.equal(changed[1][:10], changed[3])
    assert not torch.equal(changed[1], base)
    assert changed[0] is args[0]
    assert changed[4] is args[4]


@pytest.mark.slow
def test_a_budget_weighs_by_it():
    """Where one block alone is sensitive, an error in it costs all that errors cost, whichever it is; what all together cost
    stays the same."""
    model, inputs = models.transformer(layers=3)
    calibration = actpass.calibrate(model, inputs, options=OPTIONS)

    def errors(loud: str) -> dict[str, float]:
        rows = tuple(replace(r, factor=1.0 if loud in r.module else 0.0) for r in calibration.rows)
        options = {**OPTIONS, "sensitivities": actpass.Sensitivities(rows, "by hand")}
        torch.compiler.reset()
        decided = explain_model(model, (), inputs, options).regions[0].decided
        assert decided is not None
        region, cut = decided.region, decided.choice.cut
        tensors = [t for t in region.saved(region.joint, cut) if calibration.find(module_of(region, t.node), t.node)]
        costs = region.costs(cut, tensors)
        return {b: sum(costs.error_of_form(t, "int8") for t in tensors if b in module_of(region, t.node)) for b in BLOCKS}

    one, other = errors(BLOCKS[0]), errors(BLOCKS[1])
    assert one[BLOCKS[0]] == pytest.approx(QUANTIZERS["int8"].error, rel=0.3)
    assert other[BLOCKS[1]] == pytest.approx(QUANTIZERS["int8"].error, rel=0.3)
    assert one[BLOCKS[1]] == one[BLOCKS[2]] == other[BLOCKS[0]] == 0.0


def module_of(region: Region, name: str) -> str:
    return next(module_path(n) for n in region.joint.gm.graph.nodes if n.name == name)


def test_a_file_gives_it_back_and_a_broken_one_is_an_error(tmp_path: Path):
    model, inputs = models.mlp()
    calibration = actpass.calibrate(model, inputs, options=OPTIONS)
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert actpass.Sensitivities.load(path) == calibration
    assert actpass.options.parse({"sensitivities": str(path)}).sensitivities == calibration
    for text in ("", "[]", "{}", path.read_text().replace('"schema_version": 1', '"schema_version": 9')):
        path.write_text(text)
        with pytest.raises(actpass.OptionError, match="not usable"):
            actpass.Sensitivities.load(path)
    with pytest.raises(actpass.OptionError, match="not usable"):
        actpass.options.parse({"sensitivities": 3})


def test_a_model_that_saves_nothing_has_nothing_to_calibrate():
    with pytest.raises(actpass.OptionError, match="nothing to calibrate"):
        actpass.calibrate(nn.Linear(4, 1), {"input": torch.randn(1, 4)})

"""What the report says is what happened: saved bytes to the byte, a round trip of its data, its words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.memory.profiler import measure
from actpass.reporting import Record
from actpass.torch_compat import BackendCompilerFailed

from . import models
from .helpers import eager_actcomp, projected, step


class LossOnly(nn.Module):
    """Logits that are returned stay alive, too; here only the loss is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).loss


def bert() -> models.Made:
    model, inputs = models.bert()
    return LossOnly(model), inputs


@pytest.mark.architectures
@pytest.mark.codegen
@pytest.mark.short_tier
@pytest.mark.parametrize("build", [models.mlp, models.transformer, bert], ids=lambda f: f.__name__)
def test_report_saved_bytes_are_what_is_alive_between_forward_and_backward(build):
    """Compiled by Inductor; measured by the profiler's allocation events. What the caller gets (the loss) is alive as well."""
    model, inputs = build()
    compiled = torch.compile(model, backend="actcomp", options={"projection": "rademacher", "rank": 0.25})
    step(compiled, model, inputs)
    alive = measure(lambda: compiled(**inputs))
    loss_bytes = alive.result.untyped_storage().nbytes()
    report = actpass.report(model)
    assert any(s.projection for r in report.regions for s in r.sites)
    assert alive.kept_bytes - loss_bytes == report.saved_bytes
    assert sum(s.bytes_after for r in report.regions for s in r.sites) == report.saved_bytes


def test_report_before_the_first_step_says_inactive_and_why():
    report = actpass.report(nn.Linear(2, 2))
    assert not report.active
    assert "inactive, because no training step" in str(report)


def test_report_of_something_else_is_an_error_that_says_what_is_taken():
    with pytest.raises(actpass.ReportError, match=r"takes the torch.nn.Module.*not int"):
        actpass.report(3)  # pyright: ignore[reportArgumentType]


def test_report_finds_the_loss_region_behind_a_graph_break():
    """It has no parameters to be found by; its activations are part of the step all the same."""
    model, inputs = models.mlp()
    function = torch.compile(lambda x: _loss(model.mid(model.up(x))), backend=eager_actcomp())
    function(**inputs).backward()
    first, second = actpass.report(model).regions
    assert first.parameters
    assert not second.parameters
    assert second.totals.saved_bytes > 0
    assert any("another region computed" in note for note in second.notes)
    assert actpass.report(nn.Linear(2, 2)).regions == ()


def _loss(y: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return (y.exp().sin() @ y.T).exp().mean()


def test_report_shows_the_compilation_that_ran_last_not_the_sum_of_all():
    model, _ = models.mlp()
    function = torch.compile(model, backend=eager_actcomp(), dynamic=False)
    saved = []
    for tokens in (16, 32, 16):
        function(torch.randn(tokens, 24)).backward()
        saved.append(actpass.report(model).saved_bytes)
        assert len(actpass.report(model).regions) == 1
    assert saved[1] > saved[0] == saved[2]


@pytest.mark.slow
def test_report_survives_json():
    model, inputs = models.transformer()
    step(torch.compile(model, backend=eager_actcomp(projection="haar")), model, inputs)
    report = actpass.report(model)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["schema_version"] == 8
    assert tuple(Record.from_dict(r) for r in data["regions"]) == report.regions


@pytest.mark.architectures
def test_report_totals_are_the_sums_of_their_sites():
    model, inputs = models.llama()
    explained = actpass.explain(model, options={"projection": "haar", "rank": 0.25, "skip_unprofitable": False}, **inputs)
    (region,) = explained.regions
    assert sum(s.bytes_before for s in region.sites) == region.totals.saved_bytes_default
    assert sum(s.bytes_after for s in region.sites) == region.totals.saved_bytes
    assert region.totals.saved_bytes_eager is not None
    assert region.totals.saved_bytes < region.totals.saved_bytes_default < region.totals.saved_bytes_eager
    extra = sum(s.extra_flops for s in region.sites)
    assert region.totals.backward_matmul_flops - region.totals.backward_matmul_flops_default == extra
    assert region.totals.extra_matmuls == region.totals.extra_attention == 0


@pytest.mark.architectures
def test_report_folds_identical_layers():
    model, inputs = models.llama()
    text = str(actpass.explain(model, options={"projection": "haar"}, **inputs))
    assert "model.layers.*.mlp" in text
    assert "(x2)" in text
    assert "active, projection='haar'" in text
    assert "layers.0." not in "\n".join(line for line in text.splitlines() if "mlp" in line)


def test_report_names_the_override_that_decided_nothing():
    model, inputs = models.mlp()
    text = str(actpass.explain(model, options={"projection": "haar", "module_overrides": {"no_such_layer": "save"}}, **inputs))
    assert "override 'no_such_layer' decided no site" in text


@pytest.mark.architectures
def test_explain_works_without_memory_on_the_meta_device():
    model, inputs = models.llama()
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    real = actpass.explain(model, options={"projection": "haar"}, **inputs)
    meta = actpass.explain(model.to("meta"), options={"projection": "haar"}, **on_meta)
    assert replace(meta.totals, saved_bytes_eager=real.totals.saved_bytes_eager) == real.totals  # HF's eager code reads values
    assert meta.plan_hash == real.plan_hash


@pytest.mark.architectures
@pytest.mark.parametrize("options", [{}, {"memory_budget": "20MB"}], ids=["auto", "bytes"])
def test_meta_device_is_told_what_a_real_one_is_with_deferred_logits_and_frozen_parameters(options: dict[str, Any]):
    """No autocast exists there, and what stands for its parameters while the pass runs are no parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, use_cache=False
    )
    model = LlamaForCausalLM(config).train()
    model.model.embed_tokens.requires_grad_(False)
    tokens = torch.randint(3, 256, (4, 64))
    real = actpass.explain(model, input_ids=tokens, labels=tokens, options=options)
    tokens = tokens.to("meta")
    meta = actpass.explain(model.to("meta"), input_ids=tokens, labels=tokens, options=options)
    assert "deferred" in " ".join(meta.regions[0].notes)
    assert replace(meta.totals, saved_bytes_eager=real.totals.saved_bytes_eager) == real.totals
    assert meta.plan_hash == real.plan_hash
    assert (meta.step_bytes is not None) == bool(options)


def test_parameters_that_are_arguments_are_told_so():
    """Their weight gradients are exact, whatever the method: nothing but a name tells them from inputs."""
    model, other = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)), nn.Linear(24, 40)
    x = torch.randn(32, 24)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def forward(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (x,)).square().mean()

    run = torch.compile(forward, backend=eager_actcomp(projection="haar", rank=4, skip_unprofitable=False))
    with pytest.warns(
        actpass.ActpassWarning, match=r"projection='haar' projects nothing here.*0\.weight, .*Compile the module"
    ):
        run(parameters).backward()
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(parameters[name].grad, p.grad, rtol=1e-5, atol=1e-8)
    said = str(actpass.report(model))
    assert "active, projection='haar'" in said
    assert "are arguments of the compiled function (as with torch.func.functional_call)" in said
    assert not actpass.report(other).active
    torch.compiler.reset()
    run = torch.compile(forward, backend=eager_actcomp(projection="haar", rank=4, skip_unprofitable=False))
    run(dict(model.named_parameters())).backward()  # the module's own: a parameter is a parameter
    assert projected(actpass.report(model)) == {"0.weight", "2.weight"}


def test_a_recurrent_model_that_dynamo_does_not_compile_is_told_so(no_codegen: None):
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0].square().mean()

    model = torch.compile(Recurrent(), backend="actcomp")
    model(torch.randn(4, 2, 8)).backward()
    report = actpass.report(model)
    assert not report.active
    assert "what calls LSTM of torch.nn runs in eager mode" in str(report)


@pytest.mark.parametrize("ask", [actpass.explain, actpass.explore])
def test_an_error_is_raised_as_it_is_and_not_inside_dynamos(ask: Any):
    model, inputs = models.mlp()
    with pytest.raises(actpass.BudgetError, match="memory_budget=1000 bytes of peak can't be met") as raised:
        ask(model, options={"memory_budget": 1000}, **inputs)
    assert isinstance(raised.value.__cause__, BackendCompilerFailed)
    assert raised.value.least is not None

"""The advice at the end of a report: its bytes are those of a step that is planned so, and what does not apply is not told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.memory.resident import storage_bytes
from actpass.reporting.advice import LINES, Advice

from . import models

pytestmark = pytest.mark.architectures

BATCH = {"input_ids": (tokens := torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(1))), "labels": tokens}
CHECKPOINTS, LOSS_ALONE = (
    "activation checkpointing (model.gradient_checkpointing_enable())",
    "a forward that returns the loss alone",
)
EIGHT_BITS = "AdamW's moments in 8 bits (torchao.optim.AdamW8bit)"


def llama(lora: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def advice(model: nn.Module, batch: Mapping[str, Any] = BATCH, **options: Any) -> Advice:
    found = actpass.explain(model, options=options, **batch).advice
    assert found is not None
    return found


def step_bytes(model: nn.Module, **options: Any) -> int:
    """Of a step that is planned so, with nothing else tried."""
    report = actpass.explain(model, options=options, **BATCH)
    assert report.advice is not None
    return report.advice.step_bytes


class LossAlone(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch).loss


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "plain"])
def test_each_setting_takes_what_is_foretold(lora: bool):
    model = llama(lora)
    plain = actpass.explain(model, options={"policy": "exact"}, advise=False, **BATCH)
    assert plain.advice is None
    report = actpass.explain(model, options={"policy": "exact"}, **BATCH)
    assert report.plan_hash == plain.plan_hash
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    found = report.advice
    assert found is not None
    assert sum(p.nbytes for p in found.parts) == found.step_bytes
    parts = {p.what: p.nbytes for p in found.parts}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert parts["trained parameters"] == storage_bytes(trained)
    assert parts["optimizer state (AdamW's, assumed)"] == 2 * storage_bytes(trained) + 4 * len(trained)
    assert ("frozen parameters" in parts) == lora
    assert parts["returned to the caller"] >= 4 * 4 * 64 * 256  # logits
    settings = {s.what: s.step_bytes for s in found.settings if s.planned}
    assert settings["policy='auto'"] == step_bytes(model, policy="auto") < found.step_bytes
    assert settings[LOSS_ALONE] == step_bytes(LossAlone(model), policy="exact") < found.step_bytes
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        model.disable_input_require_grads()
    assert settings[CHECKPOINTS] == step_bytes(model, policy="exact")
    assert CHECKPOINTS not in {s.what for s in advice(model, policy="exact").settings}  # it is in use
    assert found.gains[0].step_bytes == min(s.step_bytes for s in found.settings)


def test_a_step_is_that_of_a_budget_in_bytes():
    report = actpass.explain(llama(True), options={"policy": "exact", "memory_budget": "1GiB"}, **BATCH)
    assert report.advice is not None
    assert report.advice.step_bytes == report.step_bytes
    assert "policy='auto'" not in {s.what for s in report.advice.settings}  # under a budget the budget decides


def test_lines_are_few_and_say_the_figures():
    report = actpass.explain(llama(False), options={"policy": "exact"}, **BATCH)
    assert report.advice is not None
    lines = [line for line in str(report).splitlines() if line.startswith("advice: ")]
    assert lines == [f"advice: {line}" for line in report.advice.lines()]
    assert 1 < len(lines) <= LINES
    first = report.advice.parts[0]
    assert lines[0].startswith(f"advice: a step takes {report.advice.step_bytes / 1e6:.2f} MB at its peak, in the backward: ")
    assert f"{first.what} {first.nbytes / 1e6:.2f} MB, " in lines[0]
    best = report.advice.gains[0]
    assert lines[1].startswith(f"advice: {best.what}: {best.step_bytes / 1e6:.2f} MB, ")
    assert report.to_dict()["advice"]["step_bytes"] == report.advice.step_bytes


def test_state_in_8_bits_takes_what_is_foretold_and_is_told_to_adam_alone():
    torchao = pytest.importorskip("torchao.optim")
    model = llama(False)
    foretold = {s.what: s for s in advice(model).settings}
    optimizer: Any = torchao.AdamW8bit(model.parameters())
    actpass.set_optimizer(optimizer)
    now = advice(model)
    assert now.step_bytes == foretold[EIGHT_BITS].step_bytes
    assert EIGHT_BITS not in {s.what for s in now.settings}
    assert not any("assumed" in p.what for p in now.parts)
    torch.compiler.reset()


def test_frozen_weights_in_4_bits_take_what_is_foretold():
    """Less the largest of them, which is there whole while it is used."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama(True)
    now = advice(model)
    (foretold,) = (s for s in now.settings if "NF4" in s.what)
    frozen = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    assert f"{len(frozen)} of them" in foretold.what
    taken = 0
    for layer in frozen:
        codes, state = bitsandbytes.functional.quantize_4bit(layer.weight.detach(), quant_type="nf4")
        taken += codes.nbytes + state.absmax.nbytes
    whole = sum(layer.weight.nbytes for layer in frozen)
    largest = max(layer.weight.nbytes for layer in frozen)
    assert now.step_bytes - foretold.step_bytes == whole - taken - largest


def test_a_peak_while_the_optimizer_steps_is_told_so():
    """Nothing that is stored for the backward counts there."""
    batch = {name: t[:1, :16] for name, t in BATCH.items()}
    found = advice(llama(False), batch, policy="exact")
    assert found.during == "the optimizer's step"
    assert found.largest is None
    assert {s.what for s in found.gains} <= {EIGHT_BITS, *(s.what for s in found.settings if "LoRA" in s.what)}
    assert any("no gain: " in line and "policy='auto'" in line for line in found.lines())


def test_regions_behind_a_graph_break_are_one_step():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.first(x).exp()
            torch._dynamo.graph_break()
            made = self.second(hidden).sin()
            return made.square().mean(), made

    report = actpass.explain(Broken(), torch.randn(512, 64), options={"policy": "exact"})
    assert len(report.regions) == 2
    assert report.advice is not None
    assert report.totals.peak_bytes is not None
    resident = 3 * 2 * 4 * (64 * 64 + 64) + 4 * 4 + 4 * 512 * 64
    assert report.advice.step_bytes == resident + report.totals.peak_bytes
    assert sum(p.nbytes for p in report.advice.parts) == report.advice.step_bytes
    settings = {s.what for s in report.advice.settings}
    assert "policy='auto'" in settings
    assert LOSS_ALONE not in settings  # what a region returns the next may read


def test_where_nothing_is_compiled_there_is_no_advice():
    report = actpass.explain(nn.Identity(), torch.randn(4, 4))
    assert report.advice is None
    assert "advice" not in str(report)


def test_a_model_of_one_matmul_is_told_what_applies():
    model, inputs = models.mlp()
    found = actpass.explain(model, **inputs).advice
    assert found is not None
    assert CHECKPOINTS not in {s.what for s in found.settings}

"""PEFT's adapters on a Llama under optimizers other than AdamW, and with an average of the adapters: trained as in eager mode,
and their state is counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import actpass
from actpass.memory import optimizer_state
from actpass.memory.resident import storage_bytes

from .helpers import EPS

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.architectures, pytest.mark.codegen, pytest.mark.slow]

STEPS = 6
Optimizers = list[torch.optim.Optimizer]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    # factors of 64 elements a rank: 4096 and more, which is what is stored in 8 bits
    lora = peft.LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["norm"])
    return peft.get_peft_model(LlamaForCausalLM(config), lora).train()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def muon(model: Any) -> Optimizers:
    """torch's Muon for matrices, AdamW for the rest."""
    matrices, rest = ([p for p in trained(model) if (p.dim() == 2) == wanted] for wanted in (True, False))
    assert matrices
    assert rest
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)]


def torchao(model: Any) -> Optimizers:
    made: Any = pytest.importorskip("torchao.optim").AdamW8bit(trained(model), lr=1e-3)
    return [made]


def bitsandbytes(model: Any) -> Optimizers:
    return [pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained(model), lr=1e-3)]


# Some 60 operators a step round by EPS / 2 each, as random: sqrt(60 * 6) EPS / 2 = 10 EPS after STEPS steps; twice that. Muon
# orthogonalises in bfloat16: where rounding moves an element of a factor over a boundary, its update differs by 2^-8. One in
# 2^8 of them makes 2^-16 of what six steps gain, a hundredth of the loss; some thirty operators in bfloat16 a step do so.
KINDS: dict[str, tuple[Callable[[Any], Optimizers], float]] = {
    "muon": (muon, 64 * EPS),
    "torchao": (torchao, 20 * EPS),
    "bitsandbytes": (bitsandbytes, 20 * EPS),
}


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def train(model: Any, optimizers: Optimizers, after: Callable[[], object] = lambda: None) -> list[float]:
    losses: list[float] = []
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", KINDS)
def test_adapters_train_as_in_eager_mode_and_their_state_is_counted(name: str):
    make, tolerance = KINDS[name]
    plain = llama()
    want = train(plain, make(plain))
    model = llama()
    optimizers = make(model)
    actpass.set_optimizer(*optimizers)
    foreseen = sum(map(optimizer_state.state_to_come, optimizers))
    model.compile(backend="actcomp", options={"policy": "exact", "memory_budget": "1GiB"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", actpass.ActpassWarning)
        found = train(model, optimizers)
    report = actpass.report(model)
    assert report.active
    assert found[-1] < found[0] * (1 - 100 * tolerance)
    assert found == pytest.approx(want, rel=tolerance)
    held = storage_bytes(t for o in optimizers for t in optimizer_state.state_tensors(o))
    assert foreseen == held
    assert held < 1.1 * storage_bytes(trained(model))  # one copy, or two in 8 bits; AdamW has two
    whole = storage_bytes([*model.parameters(), *model.buffers(), *batch().values()])
    assert report.totals.resident_bytes == pytest.approx(held + whole, abs=2048)  # labels that are the tokens, one memory


def test_an_average_of_adapters_is_that_of_eager_mode():
    def averaged(options: dict[str, Any] | None) -> tuple[AveragedModel, list[float]]:
        model = llama()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        if options is not None:
            model.compile(backend="actcomp", options=options)
        losses = train(model, [torch.optim.AdamW(trained(model), lr=1e-3)], lambda: average.update_parameters(model))
        return average, losses

    with warnings.catch_warnings():
        warnings.simplefilter("error", actpass.ActpassWarning)
        found, losses = averaged({"policy": "exact"})
    want, plain = averaged(None)
    assert losses == pytest.approx(plain, rel=20 * EPS)
    assert losses[-1] < losses[0]
    own = found.module.state_dict()
    for name, t in want.module.state_dict().items():
        # a coordinate whose gradient is as small as its rounding moves by a share of the rate of its own
        torch.testing.assert_close(own[name], t, rtol=64 * EPS, atol=2e-3 * STEPS * 2**-6, msg=name)
    with torch.no_grad():
        assert found(**batch()).loss.item() == pytest.approx(want(**batch()).loss.item(), rel=20 * EPS)

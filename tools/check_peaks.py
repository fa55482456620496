"""The predicted peak of a training step against the measured one: small models, under some plans and under budgets of bytes.

    python tools/check_peaks.py                                  # every model, every plan, ten budgets each
    python tools/check_peaks.py --models shared-gate,lora --budgets 3 --plans auto

Prints model, plan, predicted and measured bytes: of a forward and its backward above what is resident, and under a budget also
with all that is resident, optimizer state among it. Fails if a budget is exceeded or a prediction is more than 4 % off.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from arguments import positive_int
from torch import Tensor, nn
from workloads import InParts, LossOnly, UsageError

import actpass
from actpass.errors import BudgetError
from actpass.memory.profiler import measure
from actpass.runtime import regions

LIMIT = 0.04
PLANS = {
    "inductor": {"policy": "exact", "memory_budget": 1.0},
    "exact": {"policy": "exact"},
    "auto": {"policy": "auto"},
    "int4": {"codec": "int4"},
}
Step = Callable[[Callable[..., Any]], Tensor]


class GatedLayers(nn.Module):
    """Linear layers whose outputs go through a gate: of all layers (``shared``), or one a layer."""

    def __init__(self, width: int, layers: int, *, shared: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        gates = [nn.Parameter(torch.ones(width)) for _ in range(1 if shared else layers)]
        self.gates = nn.ParameterList(gates)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = nn.functional.gelu(layer(x)) * self.gates[i % len(self.gates)] + x
        return x.square().mean()


class Adapter(nn.Module):
    """A frozen layer and a trained one of low rank behind dropout (Hu et al., "LoRA", 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x)))


def _tokens(model: nn.Module, vocab: int, shape: tuple[int, int]) -> tuple[nn.Module, Step]:
    ids = torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(0))
    return model, lambda run: run(input_ids=ids, labels=ids)


def _llama_config(**fields: Any) -> Any:
    from transformers import LlamaConfig

    fields = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, **fields}
    return LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, use_cache=False, **fields)


def _llama(**fields: Any) -> tuple[nn.Module, Step]:
    from transformers import LlamaForCausalLM

    return _tokens(LossOnly(LlamaForCausalLM(_llama_config(**fields))), 2048, (8, 128))


def _gpt2() -> tuple[nn.Module, Step]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2048, n_embd=128, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else its warning breaks the graph
    return _tokens(LossOnly(model), 2048, (8, 128))


def _bert() -> tuple[nn.Module, Step]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _tokens(LossOnly(BertForMaskedLM(config)), 2048, (8, 128))


def _lora() -> tuple[nn.Module, Step]:
    model, step = _llama()
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("proj"):
                setattr(module, name, Adapter(child, 8))
    return model, step


def _gated(*, shared: bool) -> tuple[nn.Module, Step]:
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    return GatedLayers(64, 4, shared=shared), lambda run: run(x)


MODELS: dict[str, Callable[[], tuple[nn.Module, Step]]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-in-parts": lambda: _tokens(InParts(_llama_config(num_hidden_layers=4), torch.float32).train(), 2048, (8, 128)),
    "gpt2": _gpt2,
    "bert": _bert,
    "shared-gate": lambda: _gated(shared=True),
    "own-gates": lambda: _gated(shared=False),
    "lora": _lora,
    "llama-adamw8bit": _llama,
}


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not name.endswith("adamw8bit"):
        return torch.optim.AdamW(trained, lr=1e-4)
    from torchao.optim import AdamW8bit

    return AdamW8bit(trained, lr=1e-4)


@dataclass(frozen=True)
class Row:
    """Bytes. resident, budget: of a row under a budget."""

    model: str
    plan: str
    predicted: int
    measured: int
    resident: int | None = None
    budget: int | None = None

    @property
    def is_over(self) -> bool:
        return self.budget is not None and self.resident is not None and self.resident + self.measured > self.budget

    @property
    def fails(self) -> bool:
        return self.is_over or abs(self.predicted / self.measured - 1) > LIMIT

    def __str__(self) -> str:
        verdict = "  OVER" if self.is_over else "  OFF" if self.fails else ""
        total = "" if self.resident is None else f"  in all {self.resident + self.measured:>10}"
        ratio = self.predicted / self.measured
        return f"{self.model:16} {self.plan:20} {self.predicted:>10} {self.measured:>10}  {ratio:.3f}{total}{verdict}"


def check(name: str, plan: str, options: dict[str, Any]) -> Row:
    """Compile ``name`` anew and take three steps. Raises `BudgetError` if a budget of bytes cannot be met."""
    torch.compiler.reset()
    regions.clear()
    gc.collect()
    torch.manual_seed(0)
    model, run = MODELS[name]()
    optimizer = _optimizer(name, model)
    compiled = torch.compile(model, backend="actcomp", options={"min_tensor_bytes": 1024, **options})
    for _ in range(2):  # a model in parts is planned as one after its first step
        run(compiled).backward()
        optimizer.step()
        optimizer.zero_grad()

    def begin() -> None:
        run(compiled).backward()
        model.zero_grad(set_to_none=True)

    begin()
    measured = measure(lambda: run(compiled).backward(), before=begin).peak_bytes
    totals = actpass.report(model).totals
    if totals.peak_bytes is None:
        raise UsageError(f"the peak of {name!r} under {plan!r} is not predicted:\n{actpass.report(model)}")
    budget = options.get("memory_budget")
    return Row(name, plan, totals.peak_bytes, measured, totals.resident_bytes, budget if isinstance(budget, int) else None)


def at_budgets(name: str, count: int) -> Iterator[Row]:
    """Rows of `auto` at budgets spread evenly from the least that can be met to what Inductor's default takes."""
    default = check(name, "inductor", PLANS["inductor"])
    try:
        check(name, "", {"memory_budget": 2})
    except Exception as error:  # Dynamo wraps what a backend raises
        least = next((e.least for e in _causes(error) if isinstance(e, BudgetError)), None)
        if least is None:
            raise
    else:
        raise UsageError("a budget of 2 bytes was met")
    floor = check(name, "", {"memory_budget": least})
    most = max((floor.resident or 0) + default.measured, least)
    for i in range(count):
        budget = least + (most - least) * i // max(count - 1, 1)
        yield check(name, f"budget {budget}", {"memory_budget": budget})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known. Allowed: {', '.join(known)}.")
        return found

    return parse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_names(MODELS), default=list(MODELS), metavar="A,B", help=", ".join(MODELS))
    parser.add_argument("--plans", type=_names(PLANS), default=list(PLANS), metavar="A,B", help=", ".join(PLANS))
    parser.add_argument("--budgets", type=positive_int, default=10, metavar="N", help="budgets of bytes for each model")
    given = parser.parse_args(arguments)
    print(f"torch {torch.__version__}\n{'model':16} {'plan':20} {'predicted':>10} {'measured':>10}")
    failed = 0
    for name in given.models:
        plans = (check(name, plan, PLANS[plan]) for plan in given.plans)
        for row in itertools.chain(plans, at_budgets(name, given.budgets)):
            print(row, flush=True)
            failed += row.fails
    print(f"{failed} over their budget or more than {LIMIT:.0%} off")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

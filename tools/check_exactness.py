"""Must show: what a projection may not change is bit-equal to the exact form, for every codec, projection and rank.

    python tools/check_exactness.py [--json FILE] [--models mlp llama-mini] [--ranks 0.25 1.0]

For each model, dtype, codec or projection, and rank: loss, forward outputs and (of projections) the gradient of every input,
against the step compiled with ``policy="exact"`` (bit-equal) and against plain Inductor (bit-equal, or the largest relative
difference).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actpass.options import options_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROJECTIONS = ("gaussian", "rademacher", "sparse", "haar", "srht")
POLICIES_AND_CODECS = ("auto", "int8", "int4", "int2", "float8_e4m3", "float8_e5m2")
"""Here gradients may change; loss and outputs may not."""
OPTIONS = [*PROJECTIONS, *POLICIES_AND_CODECS]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layers(x)
        return y.float().square().mean(), y


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=8192,
                use_cache=False,
            )
        )
        self.register_buffer("labels", torch.randint(0, 8192, (16, 128)))

    def forward(self, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(inputs_embeds=embedded, labels=self.labels)
        return out.loss, out.logits


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (MLP, (64, 96)),
    "llama-mini": (Llama, (16, 128, 256)),
}


@dataclass(frozen=True)
class Row:
    model: str
    dtype: str
    option: str
    rank: float
    projected: int
    loss_equal: bool
    outputs_equal: bool
    input_gradient_equal: bool
    untouched_gradients_equal: bool
    inductor_loss_equal: bool
    inductor_outputs_difference: float
    inductor_input_gradient_difference: float


@dataclass
class Result:
    loss: torch.Tensor
    outputs: torch.Tensor
    dx: torch.Tensor
    gradients: dict[str, torch.Tensor]
    projected: set[str]


def run(model: nn.Module, x: torch.Tensor, **compile_options: Any) -> Result:
    torch.compiler.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss, outputs = torch.compile(model, **compile_options)(x)
    loss.backward()
    assert x.grad is not None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Result(loss.detach(), outputs.detach(), x.grad, gradients, set())


def run_actcomp(model: nn.Module, x: torch.Tensor, **options: Any) -> Result:
    import actpass
    from actpass.runtime import regions

    regions.clear()
    result = run(model, x, backend="actcomp", options=options)
    report = actpass.report(model)
    assert report.active, report
    result.projected = {p for r in report.regions for s in r.sites if s.projection for p in s.parameters}
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def rows(models: list[str], dtypes: list[str], options: list[str], ranks: list[float], device: str) -> Iterator[Row]:
    for name in models:
        for dtype in dtypes:
            torch.manual_seed(0)
            build, shape = MODELS[name]
            model, x = build().to(device, DTYPES[dtype]), torch.randn(*shape).to(device, DTYPES[dtype])
            inductor, exact = run(model, x), run_actcomp(model, x, policy="exact")
            yield compare(name, dtype, "exact", 1.0, exact, exact, inductor)
            for option in options:
                if option in POLICIES_AND_CODECS:
                    ours = run_actcomp(model, x, **options_for(option), min_tensor_bytes=0)
                    yield compare(name, dtype, option, 1.0, ours, exact, inductor)
                    continue
                for rank in ranks:
                    ours = run_actcomp(model, x, **options_for(option), rank=rank, skip_unprofitable=False)
                    yield compare(name, dtype, option, rank, ours, exact, inductor)


def compare(name: str, dtype: str, option: str, rank: float, ours: Result, exact: Result, inductor: Result) -> Row:
    untouched = [n for n in exact.gradients if n not in ours.projected]
    return Row(
        model=name,
        dtype=dtype,
        option=option,
        rank=rank,
        projected=len(ours.projected),
        loss_equal=torch.equal(ours.loss, exact.loss),
        outputs_equal=torch.equal(ours.outputs, exact.outputs),
        input_gradient_equal=torch.equal(ours.dx, exact.dx),
        untouched_gradients_equal=all(torch.equal(ours.gradients[n], exact.gradients[n]) for n in untouched),
        inductor_loss_equal=torch.equal(ours.loss, inductor.loss),
        inductor_outputs_difference=difference(ours.outputs, inductor.outputs),
        inductor_input_gradient_difference=difference(ours.dx, inductor.dx),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=OPTIONS, help="projections, policies and codecs")
    parser.add_argument("--ranks", nargs="+", type=float, default=[0.25])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.models, arguments.dtypes, arguments.options, arguments.ranks, arguments.device):
        print(json.dumps(asdict(row)), flush=True)
        found.append(asdict(row))
    if arguments.json:
        header = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        arguments.json.write_text(json.dumps({**header, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

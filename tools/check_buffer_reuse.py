"""Must show: Inductor's reuse of memory never reaches what our called graphs (codes, pieces of the loss) read or return.

    python tools/check_buffer_reuse.py [--seeds 0 1 2] [--forms auto int4 ...]

For each seed a small random model (width, layers, norms, activations, attention, dtype, loss) and for each form one step,
compiled with ``allow_buffer_reuse`` on and off: loss and gradients must be the same bits. Prints a line each: how many graphs
are called, how many buffers are reused, what differs; exits with 1 if anything does. Two compilations a line, about a minute on
an idle core. On one thread: the sums of several differ.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actpass.options import options_for
from actpass.runtime import regions
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import run_and_get_code

FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"policy": "exact"},
    **{name: {**options_for(name)} for name in ("int16", "int8", "int4", "int2", "float8_e4m3", "float8_e5m2", "haar", "prac")},
    "int4 rotated": {"codec": "int4", "hadamard_rotation": True},
    "haar int8": {"projection": "haar", "codec": "int8", "skip_unprofitable": False},
    "prac int8": {"projection": "prac", "codec": "int8"},
    "haar low_rank": {"projection": "haar", "weight_gradient_format": "low_rank"},
    "budget 0.5": {"memory_budget": 0.5},
    "budget 0.3": {"memory_budget": 0.3},
}
WORDS = 480
Result = dict[str, torch.Tensor]


class Layer(nn.Module):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.heads, self.fused = draw.choice((2, 4)), draw.random() < 0.5
        norm = draw.choice((nn.LayerNorm, nn.RMSNorm))
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = draw.choice((2, 3)) * width
        self.gate = nn.Linear(width, hidden) if draw.random() < 0.5 else None
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = draw.choice((F.silu, F.gelu, torch.tanh, F.relu))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        made = self.act(self.up(h)) if self.gate is None else self.act(self.gate(h)) * self.up(h)
        return x + self.down(made)


class Model(nn.Module):
    """The random model of a seed, and a batch in which each token is there once: no sum of an embedding's rows in any order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        width = draw.choice((32, 48, 64))
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Layer(draw, width) for _ in range(draw.choice((1, 1, 2))))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=draw.random() < 0.5)
        self.z = draw.choice((0.0, 1e-3))
        self.batch = torch.randperm(WORDS).view(draw.choice((2, 4)), -1)
        self.to(draw.choice((torch.float32, torch.bfloat16)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x)).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), tokens.roll(-1, 1).flatten())
        return loss + self.z * logits.float().logsumexp(-1).square().mean() if self.z else loss


def run(seed: int, form: dict[str, Any], reuse: bool) -> tuple[Result, str]:
    """The loss and the gradients of one step, and the generated code."""
    torch.compiler.reset()
    regions.clear()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    model = Model(seed)
    options = {"min_tensor_bytes": 0, **form, "inductor_options": {"allow_buffer_reuse": reuse}}
    compiled = torch.compile(model, backend="actcomp", options=options)

    def step() -> Result:
        loss = compiled(model.batch)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **{n: getattr(g, "dense", lambda g=g: g)() for n, g in found.items()}}

    result, sources = run_and_get_code(step)
    return result, "\n".join(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for seed in arguments.seeds:
        for form in arguments.forms:
            (on, code), (off, _) = (run(seed, FORMS[form], reuse) for reuse in (True, False))
            different = [n for n in on if not torch.equal(on[n], off[n])]
            called, reused = len(re.findall(r"# subgraph: actpass_", code)), code.count("# reuse")
            print(f"seed {seed} {form:14s} {called:3d} calls {reused:4d} reused {different or 'same bits'}", flush=True)
            failed = failed or bool(different)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Random models of 3 to 12 operators with linear layers, and what the pass must keep true of each of them.

A model is a `Spec`, plain data, so that one that fails can be printed and built again. Tensors are (2, 5, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from actpass.analysis.partitioned import PartitionedGraph
from actpass.codecs import PROJECTIONS
from actpass.errors import BudgetError
from actpass.ir.joint_graph import tensor_bytes
from actpass.options import options_for
from actpass.pipeline import Compiled

from .helpers import Grads, assert_equal, grads_of
from .tracing import JointGraph, Run, stock, trace

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]
BATCH, LENGTH, WIDTHS = 2, 5, (4, 8, 12)
SEEDS = 48

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(torch.tanh(x)),
    "sin": torch.sin,
    "square": lambda x: (x / 2).square(),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1, 1),
    "softplus": F.softplus,
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "minus mean": lambda x: x - x.mean(-1, keepdim=True),
    "over maximum": lambda x: x / (1 + x.abs().amax(-1, keepdim=True)),
    "mean of tokens": lambda x: x.mean(1, keepdim=True).expand(x.shape),
    "scaled by a sum": lambda x: torch.tanh(x.sum(1, keepdim=True)) * x,
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "swap halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "transposed": lambda x: (x.transpose(1, 2) * 1.5).transpose(1, 2),
    "flattened": lambda x: torch.tanh(x.flatten(0, 1)).view(x.shape),
    "shifted": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "mixed tokens": lambda x: (x @ x.transpose(-2, -1) / x.shape[-1]) @ x,
}
"""Of one tensor, whose shape they keep."""
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: a * torch.tanh(b),
    "div": lambda a, b: a / (1 + b.square()),
    "maximum": torch.maximum,
    "gate": lambda a, b: F.silu(a) * b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "scores": lambda a, b: (a @ b.transpose(-2, -1) / a.shape[-1]).softmax(-1) @ b,
}
"""Of two tensors of one shape."""
LAYERS = ("linear", "linear without bias", "scale", "attention")
"""With parameters."""


@dataclass(frozen=True)
class Operator:
    """name: of `UNARY`, `BINARY` or `LAYERS`. of: which values it reads; 0 is the input. width: of its result."""

    name: str
    of: tuple[int, ...]
    width: int


Spec = tuple[Operator, ...]


def random_spec(choose: Choose[Any]) -> Spec:
    """3 to 12 operators behind a linear layer, of which two in five are layers, drawn by ``choose``."""
    widths, spec = [WIDTHS[0]], list[Operator]()

    def append(name: str, of: tuple[int, ...], width: int) -> None:
        spec.append(Operator(name, of, width))
        widths.append(width)

    append("linear", (0,), choose(WIDTHS))
    for _ in range(choose(range(2, 12))):
        at = choose(range(max(1, len(widths) - 3), len(widths)))  # one of the last three values, so that most are used
        names = choose((LAYERS, LAYERS, tuple(UNARY), tuple(BINARY), tuple(UNARY)))
        name = choose(names)
        if name in BINARY:
            append(name, (at, choose([i for i in range(1, len(widths)) if widths[i] == widths[at]])), widths[at])
        else:
            append(name, (at,), choose(WIDTHS) if name.startswith("linear") else widths[at])
    return tuple(spec)


class RandomModel(nn.Module):
    """The model of a spec. The loss is a mean of squares of all values that nothing reads."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        widths = [WIDTHS[0], *(o.width for o in spec)]
        self.layers = nn.ModuleDict({str(i): _layer(o, widths[o.of[0]]) for i, o in enumerate(spec) if o.name in LAYERS})
        read = {i for o in spec for i in o.of}
        self.unread = [i for i in range(1, len(widths)) if i not in read]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for i, o in enumerate(self.spec):
            operands = [values[k] for k in o.of]
            function: Any = self.layers[str(i)] if o.name in LAYERS else UNARY.get(o.name) or BINARY[o.name]
            values.append(function(*operands))
        # against what varies over the features: the mean square of a normalised row is a constant, whose gradient is rounding
        targets = (torch.linspace(-1, 1, values[i].shape[-1]) for i in self.unread)
        return torch.stack([(values[i] - t).square().mean() for i, t in zip(self.unread, targets, strict=True)]).sum()


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Attention(nn.Module):
    """Fused, causal, two heads, a residual around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def _layer(o: Operator, width: int) -> nn.Module:
    if o.name == "scale":
        return Scale(width)
    return Attention(width) if o.name == "attention" else nn.Linear(width, o.width, bias=o.name == "linear")


def build(spec: Spec) -> tuple[RandomModel, dict[str, torch.Tensor]]:
    torch.manual_seed(len(spec))
    return RandomModel(spec), {"x": torch.randn(BATCH, LENGTH, WIDTHS[0])}


SMALL: dict[str, Any] = {"min_tensor_bytes": 0}
LOW_BIT = ("auto", "int16", "int8", "int4", "int2", "float8_e4m3", "float8_e5m2")
BUDGETS = (0.3, 0.5, 0.7)
FORMS: tuple[dict[str, Any], ...] = (
    *({**options_for(m)} for m in LOW_BIT),
    {"codec": "int4", "rounding": "stochastic", "group_size": 8},
    {"codec": "int8", "hadamard_rotation": True},
    *({**options_for(m), "rank": 0.5, "skip_unprofitable": False} for m in PROJECTIONS),
    *({**options_for(m), "rank": 2, "skip_unprofitable": False} for m in PROJECTIONS),
    {"projection": "haar", "rank": 0.5, "skip_unprofitable": False, "codec": "int8"},
    *({"memory_budget": b} for b in BUDGETS),
    *({"policy": "exact", "memory_budget": b} for b in BUDGETS),
    {"projection": "haar", "rank": "budget", "memory_budget": 0.5},
)
"""Options that need no learned subspace."""


def check(spec: Spec, forms: Sequence[dict[str, Any]]) -> None:
    """Raise `AssertionError` for what does not hold of the model of ``spec`` under one of the ``forms``: results bit-equal to
    those of Inductor's own cut, kept bytes as reported, a budget held; of exact forms all gradients bit-equal; of projections
    of weight gradients alone all others bit-equal, and these unbiased and of the variance that the method promises."""
    model, inputs = build(spec)
    joint = trace(model, inputs)
    plain = joint.run(*stock(joint))
    model(**inputs).backward()
    _check_against_eager(plain, grads_of(model))
    for form in ({"policy": "exact"}, *forms):
        options = {**SMALL, **form}
        try:
            done = joint.compiled(**options)
        except BudgetError as refused:  # what the refusal says will do must do
            least = 0.0 if refused.least is None else float(refused.least)
            _holds(least > options["memory_budget"], f"{options} were refused, and {least} would do")
            options["memory_budget"] = least
            done = joint.compiled(**options)
        _check_form(joint, done, plain, options)


def _holds(claim: bool, told: str) -> None:
    if not claim:
        raise AssertionError(told)


def _check_against_eager(plain: Run, eager: Grads) -> None:
    """To rounding: of the largest gradient, because some are zero but for what is left of terms that cancel."""
    largest = max(float(g.norm()) for g in eager.values())
    worst = max(float((plain.gradients[n] - g).norm()) for n, g in eager.items())
    assert worst <= 1e-4 * largest, f"the trace is off by {worst:.1e} of {largest:.1e}"


def _check_form(joint: JointGraph, done: Compiled, plain: Run, options: dict[str, Any]) -> None:
    totals, told = done.record.totals, f"{options}\n{done.record.plan}"
    got = joint.run(done.forward, done.backward)
    assert all(torch.equal(a, b) for a, b in zip(got.results, plain.results, strict=True)), told
    kept = got.kept - _never_whole(done.cut)
    assert kept == totals.saved_bytes, f"{kept} bytes are kept, {totals.saved_bytes} reported, {told}"
    budget = options.get("memory_budget")
    assert budget is None or kept <= budget * totals.saved_bytes_default, told
    storages = [s for s in done.record.plan["storages"] if s["codec"] != "save"]
    decisions = [d for d in done.record.plan["decisions"] if d["rank"] is not None]
    projected = {p for d in decisions for p in d["parameters"]}
    assert got.gradients.keys() == plain.gradients.keys()
    assert all(g.isfinite().all() for g in got.gradients.values()), told
    if options.get("policy") == "exact":
        assert not storages, told
        assert not decisions, told
    if not storages:
        assert_equal(_without(got.gradients, projected), _without(plain.gradients, projected))
    if decisions and not storages:
        _check_variance(joint, done, plain, decisions)


def _never_whole(cut: PartitionedGraph) -> int:
    """Bytes of what only parts cross of: Inductor computes these by themselves, and node by node they keep the whole alive."""
    nodes = {n.name: n for n in cut.forward.graph.nodes}
    parts = {base: saved for base, saved in cut.crossing.items() if all(s.holder != base for s in saved)}
    return sum(tensor_bytes(nodes[base]) - sum(s.nbytes for s in saved) for base, saved in parts.items())


def _without(gradients: Grads, names: set[str]) -> Grads:
    return {n: g for n, g in gradients.items() if n not in names}


def _check_variance(joint: JointGraph, done: Compiled, plain: Run, decisions: Sequence[dict[str, Any]]) -> None:
    """The mean error over `SEEDS` seeds is noise (z <= 6), and its square on average what the projection says of its rank: to 6
    of its own standard errors, and where a square is rare and large, by half."""
    runs = [joint.run(done.forward, done.backward, seed) for seed in range(1, SEEDS + 1)]
    for d in decisions:
        for name in d["parameters"]:
            want = plain.gradients[name].double()
            errors = torch.stack([r.gradients[name].double() - want for r in runs])
            squares = errors.square().flatten(1).sum(1)
            exact = float(want.square().sum())
            noise = 1e-10 * exact + 1e-20
            mean, spread = float(squares.mean()), float(squares.std()) / SEEDS**0.5
            bias = float(errors.mean(0).square().sum())
            told = f"{name}, {d['projection']} of rank {d['rank']} in {d['width']}: bias^2 {bias:.2e}, variance {mean:.2e}"
            assert bias <= 36 * mean / SEEDS + noise, told
            expected = PROJECTIONS[d["projection"]].relative_variance(d["width"], d["rank"]) * exact
            assert abs(mean - expected) <= 6 * spread + 0.5 * expected + noise, f"{told}, {expected:.2e} expected"

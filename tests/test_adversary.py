"""Models that once broke the pass, each with the invariant that told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.memory.profiler import measure

from .helpers import assert_close, eager_actcomp, projected, step

D = 16
FULL = {"projection": "srht", "rank": 1.0, "skip_unprofitable": False}
EPS = torch.finfo(torch.float32).eps


class Model(nn.Module):
    def __init__(self, forward: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x).square().mean()


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 0.2)


def stem(width: int = D) -> nn.Linear:
    return nn.Linear(D, width)


TWO_SIDED = {
    "square": (16, lambda m, x: (m.a @ m.s(x)) @ m.w + m.s(x) @ m.w),
    "tall": (24, lambda m, x: m.s(x) @ m.w + m.a @ m.s(x)),
}


@pytest.mark.parametrize("name", TWO_SIDED)
def test_tensor_contracted_from_both_sides_keeps_them_apart(name: str):
    """One permuted node is the right factor of one gradient and the left factor of another; the features differ."""
    tokens, forward = TWO_SIDED[name]
    model = Model(forward, s=stem(), a=weight(tokens, tokens), w=weight(D, D))
    inputs = {"x": torch.randn(tokens, D)}
    _, exact = step(torch.compile(model, backend=eager_actcomp()), model, inputs)
    torch.compiler.reset()
    _, full = step(torch.compile(model, backend=eager_actcomp(FULL)), model, inputs)
    assert {"a", "w"} <= projected(actpass.report(model))
    assert_close(full, exact, 64 * EPS)


def test_input_named_like_a_parameter_is_an_input():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = stem()

        def forward(self, x: torch.Tensor, task_parameters: torch.Tensor) -> torch.Tensor:
            return (task_parameters @ self.s(x).t()).square().mean()

    model, x, task = Task(), torch.randn(32, D), torch.randn(8, D, requires_grad=True)
    gradients = []
    for options in ({}, {"projection": "rademacher", "rank": 4, "skip_unprofitable": False}):
        torch.compiler.reset()
        task.grad = None
        step(torch.compile(model, backend=eager_actcomp(options)), model, {"x": x, "task_parameters": task})
        gradients.append(task.grad)
    assert torch.equal(*gradients)
    assert projected(actpass.report(model)) == {"s.weight"}


READ_AGAIN = {
    "cast": lambda m, x: F.linear(x.sin(), (m.w.double() + m.v.double() @ (x.t() @ x / 8).double()).float()),
    "view": lambda m, x: F.linear(x.sin(), m.w.view(-1).view(8, D) + (m.v.view(-1).view(8, D) @ (x.t() @ x / 8))),
}


@pytest.mark.parametrize("name", READ_AGAIN)
def test_gradient_read_again_behind_a_move_is_left_alone(name: str):
    model = Model(READ_AGAIN[name], w=weight(8, D), v=weight(8, D))
    step(
        torch.compile(model, backend=eager_actcomp(projection="rademacher", rank=4, skip_unprofitable=False)),
        model,
        {"x": torch.randn(8, D)},
    )
    report = actpass.report(model)
    assert report.active
    reasons = {parameter: reason for r in report.regions for _, parameter, reason in r.rejected}
    assert "w" not in projected(report)
    assert "also read by" in reasons["w"]


def test_one_graph_called_again_for_each_of_two_modules():
    layers = [Model(lambda m, x: m.b(m.a(x).tanh()), a=stem(), b=stem()) for _ in range(2)]
    for layer in layers:
        layer.compile(backend=eager_actcomp(projection="rademacher", rank=4, skip_unprofitable=False))
    for _ in range(3):
        for layer in layers:
            layer(torch.randn(8, D)).backward()
    assert all(actpass.report(layer).active for layer in layers)


def test_model_without_a_backward_runs_under_a_projecting_method():
    model = nn.Linear(D, D).requires_grad_(False)
    x = torch.randn(4, D)
    assert torch.allclose(torch.compile(model, backend=eager_actcomp(projection="haar"))(x), model(x))


def test_report_of_another_model_of_the_same_class_is_inactive():
    model, other = nn.Linear(D, D), nn.Linear(D, D)
    torch.compile(model, backend=eager_actcomp())(torch.randn(4, D)).sum().backward()
    assert actpass.report(model).active
    assert not actpass.report(other).active


def halves(m: Model, x: torch.Tensor) -> torch.Tensor:
    p, q = m.s(x).chunk(2, -1)
    return F.silu(p) * m.b(q)


@pytest.mark.parametrize("overrides", [{}, {"b": "save"}])
def test_part_of_a_storage_is_not_freed_while_another_part_is_read(overrides: dict[str, str]):
    """The fused gate/up shape: z in place of one half frees nothing, because the other half keeps the buffer."""
    model, inputs = Model(halves, s=stem(2 * D), b=stem()), {"x": torch.randn(64, D)}
    options = {"projection": "rademacher", "rank": 4, "skip_unprofitable": False, "module_overrides": overrides}
    function = torch.compile(model, backend=eager_actcomp(options))
    step(function, model, inputs)
    report = actpass.report(model)
    assert report.active
    assert report.saved_bytes <= report.totals.saved_bytes_default + 40  # the seed
    assert sum(s.bytes_after for r in report.regions for s in r.sites) == report.saved_bytes
    alive = measure(lambda: function(**inputs))
    assert alive.kept_bytes - 4 == report.saved_bytes  # the loss


def test_slices_of_one_storage_with_different_wishes_do_not_fall_back():
    model = Model(
        lambda m, x: m.a(m.s(x)[:, :8]).sin() + m.b(m.s(x)[:, 8:]).cos(), s=stem(), a=nn.Linear(8, 8), b=nn.Linear(8, 8)
    )
    options = {"projection": "rademacher", "rank": 4, "skip_unprofitable": False, "module_overrides": {"b": "save"}}
    step(torch.compile(model, backend=eager_actcomp(options)), model, {"x": torch.randn(64, D)})
    assert actpass.report(model).active
    assert projected(actpass.report(model)) == {"s.weight", "a.weight"}


def test_explain_leaves_the_model_and_its_own_compile_alone():
    model = nn.Sequential(nn.BatchNorm1d(D), nn.Dropout(0.5), stem())
    model.compile(backend=eager_actcomp(projection="haar"))
    state = torch.get_rng_state()
    actpass.explain(model, torch.randn(8, D, generator=torch.Generator().manual_seed(1)))
    assert int(model[0].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not actpass.report(model).active


def test_a_maximum_is_compared_behind_a_flip_with_what_it_was_taken_of():
    """The gradient of amax divides by how many elements are equal to it: of a tensor rebuilt from codes none may be."""

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sigmoid(self.first(x).flip(-1))
            return self.last(h / (1 + h.amax(-1, keepdim=True))).square().mean()

    torch.manual_seed(0)
    model = Flipped()
    options = {"codec": "int2", "min_tensor_bytes": 0}
    torch.compile(model, backend=eager_actcomp(options))(torch.randn(64, 16)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())

"""Graphs that a graph calls: a user's nested regions are put in line, and our own return memory of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx_inner
from torch.utils.checkpoint import checkpoint

import actpass
from actpass.diagnostics.explain import explain_model
from actpass.ir.editor import GraphEditor
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import FakeTensorMode, invoke_subgraph, run_and_get_code

from . import models
from .helpers import EPS, Grads, assert_close, assert_equal, eager_actcomp, step

FORMS: dict[str, dict[str, Any]] = {
    "exact": {"policy": "exact"},
    "auto": {"policy": "auto"},
    "int4": {"codec": "int4"},
    "haar": {"projection": "haar", "rank": 0.5, "skip_unprofitable": False},
    "budget": {"policy": "auto", "memory_budget": 0.75},
}


def first_half(block: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(block(x) + block.shift, 0.2, block.training)


def second_half(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x + block.down(torch.sigmoid(block.up(x)))


def layer(block: Any, x: torch.Tensor) -> torch.Tensor:
    return second_half(block, first_half(block, x))


nested_compile_region: Any = torch.compiler.nested_compile_region
marked_half = nested_compile_region(second_half)


def layer_of_a_region(block: Any, x: torch.Tensor) -> torch.Tensor:
    return marked_half(block, first_half(block, x))


region_of_a_region = nested_compile_region(layer_of_a_region)


class Marked(models.Transformer):
    """Blocks with a buffer and dropout, each called by ``layer``; with ``around`` inside activation checkpointing."""

    def __init__(self, layer: Callable[..., torch.Tensor] = layer_of_a_region, around: bool = False) -> None:
        super().__init__()
        self.layer, self.around = layer, around
        for block in self.blocks:
            block.register_buffer("shift", torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(self.layer, block, x, use_reentrant=False) if self.around else self.layer(block, x)
        return self.head(self.norm(x)).square().mean()


def made(**how: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Marked(**how), {"x": torch.randn(2, 16, 32)}


def run(model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, Grads]:
    torch.compiler.reset()
    backend = eager_actcomp({"min_tensor_bytes": 0, "inductor_options": {"fallback_random": True}, **options})
    compiled = torch.compile(model, backend=backend)
    torch.manual_seed(1)
    return step(compiled, model, inputs)


def rows(model: nn.Module) -> list[tuple[str, str]]:
    return [(row.module, row.form) for region in actpass.report(model).regions for row in region.sites]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("called", "around", "form"),
    [
        (layer_of_a_region, False, "auto"),
        (layer_of_a_region, False, "haar"),
        (layer_of_a_region, False, "budget"),
        (region_of_a_region, False, "int4"),
        (region_of_a_region, True, "exact"),
    ],
)
def test_a_region_is_what_it_is_without_the_mark(called: Callable[..., torch.Tensor], around: bool, form: str):
    plain, inputs = made(layer=layer, around=around)
    want_loss, want = run(plain, inputs, **FORMS[form])
    want_rows, want_totals = rows(plain), actpass.report(plain).totals
    STEP_COUNTER.calls = 0  # the first call of the step again
    marked, inputs = made(layer=called, around=around)
    loss, grads = run(marked, inputs, **FORMS[form])
    report = actpass.report(marked)
    assert torch.equal(loss, want_loss)
    assert_equal(grads, want)
    assert report.active
    assert rows(marked) == want_rows, "each layer's tensors are its own"
    assert report.totals.saved_bytes == want_totals.saved_bytes
    assert report.totals.saved_bytes_default == want_totals.saved_bytes_default
    assert any("nested_compile_region" in note for region in report.regions for note in region.notes)


@pytest.mark.slow
def test_an_override_names_one_layer_of_a_region():
    model, inputs = made()
    run(model, inputs, codec="int8", module_overrides={"blocks.1": "save"})
    coded = {s["module"] for region in actpass.report(model).regions for s in region.plan["storages"] if s["codec"] != "save"}
    assert any(m.startswith("blocks.0") for m in coded), coded
    assert not any(m.startswith("blocks.1") for m in coded), coded


@pytest.mark.slow
def test_regions_of_symbolic_shapes():
    model, _ = made(layer=region_of_a_region)
    model.eval()  # no dropout: gradients are eager's
    compiled = torch.compile(model, backend=eager_actcomp(policy="exact"))
    for batch in (2, 3, 5):  # dynamic from the second on; with dynamic=True Dynamo 2.15 makes an input of eps and fails on it
        x = torch.randn(batch, 16, 32)
        _, grads = step(compiled, model, {"x": x})
        assert_close(grads, step(model, model, {"x": x})[1], 64 * EPS)


def test_dynamos_graph_stays_as_it_is():
    seen: list[tuple[fx.GraphModule, str]] = []
    backend = eager_actcomp(policy="exact")

    def watched(gm: fx.GraphModule, example_inputs: Any, **more: Any) -> Callable[..., Any]:
        seen.append((gm, gm.print_readable(print_output=False)))
        return backend(gm, example_inputs, **more)

    model, inputs = made(layer=region_of_a_region, around=True)
    torch.compile(model, backend=watched)(**inputs).backward()
    ((gm, before),) = seen
    assert "invoke_subgraph" in before
    assert gm.print_readable(print_output=False) == before


@pytest.mark.slow
def test_explain_reads_regions():
    model, inputs = made()
    (region,) = explain_model(model, (), inputs, {"policy": "exact"}).regions
    assert region.record.active
    assert not any(n.target is invoke_subgraph for n in region.forward.graph.nodes)


def loss_of_regions(mark: Callable[..., Any], x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What Inductor by itself gets wrong: the tanh is put where the second call's input lies, which its backward reads."""
    layer = mark(lambda x, w: x.square() @ w)
    h = layer(layer(torch.sin(x), w), w)
    return (torch.tanh(h) @ v + h).square().mean()


@pytest.mark.codegen
def test_gradients_of_compiled_regions_are_eagers_and_nothing_is_overwritten():
    tensors = [torch.randn(64, 64) * scale for scale in (1.0, 0.1, 1.0)]
    eager = [t.clone().requires_grad_() for t in tensors]
    loss_of_regions(lambda f: f, *eager).backward()
    compiled = [t.clone().requires_grad_() for t in tensors]
    torch.compile(loss_of_regions, backend="actcomp", options={"policy": "exact"})(nested_compile_region, *compiled).backward()
    for got, want, before in zip(compiled, eager, tensors, strict=True):
        assert torch.equal(got.detach(), before)
        assert want.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=64 * EPS, atol=64 * EPS * float(want.grad.abs().max()))


# ------------------------------------------------------------------------------------------------------------- our own calls


@pytest.mark.codegen
@pytest.mark.parametrize("alias", ["of an argument", "of a result"])
def test_what_a_called_graph_returns_is_not_overwritten(alias: str):
    """The memory of an argument, or of a result, is free for what comes behind its last reader; a view of it is still read."""

    def called(h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = h @ h
        return (made, h.view(-1)) if alias == "of an argument" else (made, made.view(-1))

    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.empty(64, 64))
    graph.output(x)
    gm = fx.GraphModule(nn.Module(), graph)
    editor = GraphEditor(gm)
    x, output = editor.graph.nodes
    h = editor.splice(torch.sin, [x], after=x, like=x)
    results = editor.call(called, [h], after=h, like=h, key="called")

    def later(read: torch.Tensor) -> torch.Tensor:
        read = read @ read
        return torch.tanh(read) @ read + read

    last = editor.splice(later, results[:1], after=results[-1], like=h)
    output.args = ((last, results[-1]),)
    gm.recompile()
    value = torch.randn(64, 64) / 8
    with torch.no_grad():
        _, view = compile_fx_inner(gm, [x.meta["val"]])([value])
    want = value.sin() if alias == "of an argument" else value.sin() @ value.sin()
    torch.testing.assert_close(view.view(64, 64), want)


class Chunky(nn.Module):
    """A norm whose input is coded, and a head whose logits weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(500, 24), nn.Linear(24, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 500)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = self.norm(h + torch.sin(self.up(h)))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


@pytest.mark.codegen
def test_codes_and_pieces_of_the_loss_are_the_same_bits_without_buffer_reuse():
    """tools/check_buffer_reuse.py does so for all forms and random models."""
    results, codes = [], []
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randperm(500, generator=draw)[:300].view(4, 75) for _ in range(2))  # once each: no sum in any order
    for reuse in (True, False):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Chunky()
        options = {"codec": "int4", "min_tensor_bytes": 0, "inductor_options": {"allow_buffer_reuse": reuse}}
        compiled = torch.compile(model, backend="actcomp", options=options)
        result, sources = run_and_get_code(lambda model=model, compiled=compiled: step(compiled, model, {"x": x, "y": y}))
        results.append(result)
        codes.append("\n".join(sources))
    (loss, grads), (want_loss, want) = results
    assert torch.equal(loss, want_loss)
    assert_equal(grads, want)
    assert all("def actpass_" in c for c in codes)
    assert "# reuse" in codes[0]

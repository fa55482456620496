"""The loss in pieces of rows: the same loss and gradients, and no tensor as large as the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpass
from actpass.diagnostics.explain import explain_model
from actpass.memory.profiler import measure
from actpass.torch_compat import invoke_subgraph, run_and_get_code

from .helpers import EPS, Grads, eager_actcomp, error, grads_of, step

TOKENS, WIDTH, WORDS = 300, 24, 500  # 300 rows in pieces of 112: the last is smaller


class Head(nn.Module):
    """An embedding, a hidden layer, a head, and a loss of the logits and the labels."""

    def __init__(
        self,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tied: bool = False,
        bias: bool = True,
        width: int = WIDTH,
    ):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(WORDS, width), nn.Linear(width, width)
        self.head = nn.Linear(width, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(torch.tanh(self.hidden(self.embed(x)))), y)


def flat(logits: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), **kwargs)


def confident(logits: torch.Tensor) -> torch.Tensor:
    """Labels and weights of the rows are formed of the logits themselves (Sohn et al., "FixMatch", 2020, arXiv 2001.07685)."""
    sure = logits.detach().softmax(-1).amax(-1) > 0.004
    return (flat(logits, logits.detach().argmax(-1), reduction="none") * sure.flatten()).mean()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": flat,
    "sum": lambda z, y: flat(z, y, reduction="sum"),
    "none": lambda z, y: flat(z, y, reduction="none").square().mean(),
    "smoothed": lambda z, y: flat(z, y, label_smoothing=0.1),
    "weighted": lambda z, y: flat(z, y, weight=torch.linspace(0.5, 1, WORDS)),
    "ignored": lambda z, y: flat(z, y.masked_fill(y % 3 == 0, -100)),
    "float32": lambda z, y: flat(z.float(), y),
    "z-loss": lambda z, y: flat(z, y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "capped": lambda z, y: flat(30 * torch.tanh(z / 30), y),
    "divergence": lambda z, y: F.kl_div(z.log_softmax(-1), F.one_hot(y, WORDS).float() + 1e-3, reduction="batchmean"),
    "scaled": lambda z, y: 1024 * flat(z, y),
    "pseudo-labels": lambda z, y: confident(z),
}


def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randint(0, WORDS, (4, TOKENS // 4), generator=draw) for name in ("x", "y")}


def run(model: nn.Module, **options: Any) -> tuple[torch.Tensor, Grads]:
    return step(
        torch.compile(model, backend=eager_actcomp(options if "codec" in options else {"policy": "exact", **options})),
        model,
        inputs(),
    )


def notes(model: nn.Module) -> str:
    return " ".join(note for region in actpass.report(model).regions for note in region.notes)


def compare(model: nn.Module, tolerance: float) -> None:
    want_loss, want = run(model, chunked_loss=False)
    loss, grads = run(model)
    assert "chunks" in notes(model), notes(model)
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=0)
    for name in want:
        assert error(grads[name], want[name]) < tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_whole(name: str):
    torch.manual_seed(0)
    compare(Head(LOSSES[name]), 300 * EPS)  # sums of 300 rows in another order


def test_the_accuracy_is_formed_in_pieces_too():
    class Counts(Head):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            logits = self.head(torch.tanh(self.hidden(self.embed(x))))
            known = logits.detach()
            right = (logits.argmax(-1) == y).sum(), (known.topk(5).indices == y[..., None]).any(-1).sum()
            return flat(logits, y), *right, known.argmax(-1), *known.max(-1)

    torch.manual_seed(0)
    model = Counts(flat)
    _, *want = model(**inputs())
    loss, *found = torch.compile(model, backend=eager_actcomp({"policy": "exact"}))(**inputs())
    assert "chunks" in notes(model), notes(model)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (True, True)])
def test_tied_weights_and_biases(tied: bool, bias: bool):
    torch.manual_seed(0)
    compare(Head(flat, tied, bias), 300 * EPS)


@pytest.mark.codegen
def test_an_embedding_that_is_the_head_adds_its_gradient_to_that_of_the_head():
    """Compiled, no more of the weight's size is allocated than the head's gradient: no zeros, no gradient of the embedding
    alone, no sum of both."""
    torch.manual_seed(0)
    model = Head(flat, tied=True, bias=False)
    _, want = run(model, chunked_loss=False)
    function = torch.compile(model, backend="actcomp", options={"policy": "exact"})
    (_, got), sources = run_and_get_code(lambda: step(function, model, inputs()))
    assert all(error(got[n], want[n]) < 64 * EPS for n in want)
    allocated = sum(source.count(f"empty_strided_cpu(({WORDS}, {WIDTH})") for source in sources)
    assert allocated == 1


def test_half_precision_weights_accumulate_in_float32():
    """Against float64 the pieces are not worse than the whole, whose one matmul accumulates in float32, too."""
    torch.manual_seed(0)
    model = Head(LOSSES["float32"])
    exact = Head(LOSSES["mean"]).double()
    exact.load_state_dict(model.bfloat16().state_dict())
    step(exact, exact, inputs())
    reference = grads_of(exact)
    _, whole = run(model, chunked_loss=False)
    _, pieces = run(model)
    assert "chunks" in notes(model)
    for name in reference:
        assert error(pieces[name], reference[name]) < 1.2 * error(whole[name], reference[name]) + 2**-9, name


def test_autocast():
    torch.manual_seed(0)
    model = Head(flat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, 2**-6)


@pytest.mark.slow
def test_low_bit_forms_leave_the_early_gradient_alone():
    torch.manual_seed(0)
    model = Head(flat)
    _, want = run(model)
    _, grads = run(model, codec="int4", min_tensor_bytes=0)
    assert torch.equal(grads["head.bias"], want["head.bias"])
    assert torch.equal(grads["head.weight"], want["head.weight"])
    storages = [s for region in actpass.report(model).regions for s in region.plan["storages"]]
    assert any("formed in the forward" in s["reason"] for s in storages)
    assert any(s["codec"] == "int4" for s in storages)


@pytest.mark.parametrize(("width", "early"), [(200, True), (400, False)])
def test_the_smaller_of_the_heads_and_the_logits_gradient_crosses(width: int, early: bool):
    """Of 300 rows. Left to itself upstream's cut takes the logits' from a width of 170 on."""
    torch.manual_seed(0)
    model = Head(flat, bias=False, width=width)
    (region,) = explain_model(model, (), inputs(), {"policy": "exact"}).regions
    crossing = {tuple(n.meta["val"].shape) for n in region.backward.graph.find_nodes(op="placeholder")}
    of_logits = [shape for shape in crossing if len(shape) == 2 and WORDS in shape and width not in shape]
    assert bool(of_logits) != early
    assert not any(n.target is torch.ops.actpass.behind.default for n in region.forward.graph.nodes)
    _, want = run(model, chunked_loss=False)
    _, got = run(model)
    assert all(error(got[n], want[n]) < 64 * EPS for n in want)


def _called(gm: Any) -> list[Any]:
    return [getattr(gm, n.args[1]) for n in gm.graph.nodes if n.target is invoke_subgraph]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.13, 0.15, 0.3])
def test_a_small_budget_does_not_run_the_pieces_again(budget: float):
    torch.manual_seed(0)
    model = Head(flat)
    _, want = run(model, chunked_loss=False)
    (region,) = explain_model(model, (), inputs(), {"policy": "exact"}).regions
    assert not any(n.target is invoke_subgraph for n in region.backward.graph.nodes)
    (region,) = explain_model(model, (), inputs(), {"memory_budget": budget}).regions
    pieces = [g for g in _called(region.backward) if any(n.target is torch.ops.aten.mm.default for n in g.graph.nodes)]
    assert not pieces
    _, grads = run(model, memory_budget=budget)
    for name in want:
        assert error(grads[name], want[name]) < 300 * EPS, name


class Returns(Head):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = self.head(self.hidden(self.embed(x)))
        return flat(logits, y), logits


class BetweenRows(Head):
    """The logits of one row enter the loss of another."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(self.embed(x)))
        return (logits - logits.mean((0, 1), keepdim=True)).logsumexp(-1).square().mean()


class SumsOfColumns(Head):
    """Softmaxed columns are divided by their sums over the rows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q = self.head(self.hidden(self.embed(x))).flatten(0, 1).softmax(-1)
        return F.nll_loss((q / q.sum(0, keepdim=True)).log(), y.flatten())


class PicksRows(Head):
    """Each row is multiplied by the first."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(self.embed(x))).flatten(0, 1)
        return F.cross_entropy(logits * logits.gather(0, torch.zeros_like(logits, dtype=torch.long)), y.flatten())


class NormsRows(Head):
    """An operator with several results for each row."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(self.embed(x)))
        return flat(F.layer_norm(logits, logits.shape[-1:]), y)


class OfTheLoss(Head):
    """A gradient that depends on all rows' loss."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return flat(self.head(self.hidden(self.embed(x))), y).exp()


class OfTheNorm(Head):
    """A sum over all axes, of which none is named."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embed(x))).norm()


@pytest.mark.parametrize("build", [BetweenRows, SumsOfColumns, PicksRows, NormsRows, OfTheLoss, OfTheNorm])
def test_what_needs_all_rows_is_left_whole_with_its_reason(build: Any):
    torch.manual_seed(0)
    model = build(flat)
    want_loss, want = run(model, chunked_loss=False)
    loss, grads = run(model)
    assert torch.equal(loss, want_loss)
    assert all(error(grads[n], want[n]) < 64 * EPS for n in want)
    assert build is OfTheLoss or "formed whole" in notes(model)


class TwoLosses(Head):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = self.head(self.hidden(self.embed(x)))
        return flat(logits, y), logits.square().mean()


class OfEachToken(Head):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return F.cross_entropy(self.head(self.hidden(self.embed(x))).flatten(0, 1), y.flatten(), reduction="none")


@pytest.mark.parametrize(("build", "advice"), [(TwoLosses, "return one loss"), (OfEachToken, "return its mean or sum")])
def test_a_loss_that_is_no_single_number_is_left_whole_with_advice(build: Any, advice: str):
    model = build(flat)
    results = torch.compile(model, backend=eager_actcomp({"policy": "exact"}))(**inputs())
    sum(r.sum() for r in (results if isinstance(results, tuple) else (results,))).backward()
    assert advice in notes(model)


def test_returned_logits_are_left_whole_with_their_reason():
    torch.manual_seed(0)
    model = Returns(flat)
    torch.compile(model, backend=eager_actcomp({"policy": "exact", "defer_logits": False}))(**inputs())[0].backward()
    assert "returned to the caller" in notes(model)


def of_length(batch: int, length: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    return {name: torch.randint(0, WORDS, (batch, length), generator=draw) for name in ("x", "y")}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_whose_number_changes(name: str, tied: bool):
    """One graph for all lengths and batches; each is in as many pieces."""
    torch.manual_seed(0)
    model = Head(LOSSES[name], tied)
    compiled = torch.compile(model, backend=eager_actcomp({"policy": "exact"}), dynamic=True)
    for batch, length in ((4, 75), (4, 120), (4, 10), (7, 33), (2, 301)):
        given = of_length(batch, length)
        want_loss, want = step(model, model, given)
        with nullcontext() if length == 75 else torch.compiler.set_stance("fail_on_recompile"):
            loss, grads = step(compiled, model, given)
        torch.testing.assert_close(loss, want_loss, rtol=300 * EPS, atol=0)
        for key in want:
            assert error(grads[key], want[key]) < 300 * EPS, (key, length)
    assert "in 3 chunks" in notes(model), notes(model)


def test_logits_that_read_how_many_rows_there_are_stay_whole():
    class OfTheLength(Head):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = self.head(torch.tanh(self.hidden(self.embed(x))))
            return flat(logits / logits.shape[1], y)

    torch.manual_seed(0)
    model = OfTheLength(flat)
    compiled = torch.compile(model, backend=eager_actcomp({"policy": "exact"}), dynamic=True)
    for length in (75, 120):
        given = of_length(4, length)
        _, want = step(model, model, given)
        _, grads = step(compiled, model, given)
        assert all(error(grads[key], want[key]) < 300 * EPS for key in want)
    assert "reads the size" in notes(model)


@pytest.mark.codegen
@pytest.mark.slow
def test_code_for_rows_whose_number_changes_holds_no_logits():
    """Under the default: the second length is what makes the graph one of all lengths. 2,400 rows of 500 words are 4.8 MB."""
    torch.manual_seed(0)
    model = Head(flat)
    compiled = torch.compile(model, backend="actcomp", options={"policy": "exact"})
    for length in (512, 600, 570):
        given = of_length(4, length)
        want_loss, want = step(model, model, given)
        loss, grads = step(compiled, model, given)
        torch.testing.assert_close(loss, want_loss, rtol=300 * EPS, atol=0)
        for key in want:
            assert error(grads[key], want[key]) < 300 * EPS, (key, length)
    given = of_length(4, 600)
    peak = measure(lambda: compiled(**given).backward()).peak_bytes
    assert peak < 0.5 * 4 * 2400 * WORDS


def test_the_budget_of_one_is_inductors_own():
    torch.manual_seed(0)
    model = Head(flat)
    run(model, memory_budget=1.0)
    assert "chunks" not in notes(model)


@pytest.mark.codegen
@pytest.mark.short_tier
def test_compiled_it_needs_less_memory():
    """By Inductor: logits of 2.4 MB, in pieces of 240 kB."""
    torch.manual_seed(0)
    model, batch = Head(flat), {name: x.repeat(1, 4) for name, x in inputs().items()}
    peak = {}
    for chunk_loss in (False, True):
        function = torch.compile(model, backend="actcomp", options={"policy": "exact", "chunked_loss": chunk_loss})
        step(function, model, batch)
        peak[chunk_loss] = measure(lambda f=function: f(**batch).backward()).peak_bytes
    assert peak[True] < 0.5 * peak[False]


@pytest.mark.codegen
def test_the_heads_gradient_is_added_up_in_place():
    torch.manual_seed(0)
    model = Head(flat)
    function = torch.compile(model, backend="actcomp", options={"policy": "exact"})
    _, sources = run_and_get_code(lambda: step(function, model, inputs()))
    (note,) = [n for n in actpass.report(model).regions[0].notes if "chunks" in n]
    added = sum(source.count("actpass.add_product_.default(") for source in sources)
    assert f"{added + 1} chunks" in note, note
    assert not any("extern_kernels.addmm(" in source.partition("add_product_")[2] for source in sources)


@pytest.mark.codegen
def test_a_piece_makes_the_constants_that_it_reads():
    """A table of the words, given from outside, would make Inductor write what the labels select as large as the logits."""
    torch.manual_seed(0)
    model = Head(flat)
    function = torch.compile(model, backend="actcomp", options={"policy": "exact"})
    _, sources = run_and_get_code(lambda: step(function, model, inputs()))
    assert any("actpass_" in source for source in sources)
    assert not any(f"empty_strided_cpu(({WORDS}, ), (1, ), torch.int64)" in source for source in sources)


@pytest.mark.slow
def test_an_int_sets_the_rows_of_a_piece_and_a_plan_keeps_them():
    torch.manual_seed(0)
    model = Head(flat)
    want_loss, want = run(model, chunked_loss=False)
    for rows in (48, 160):
        loss, grads = run(model, chunked_loss=rows)
        assert f"in {-(-TOKENS // rows)} chunks" in notes(model)
        assert error(loss, want_loss) < 4 * EPS
        assert all(error(grads[n], want[n]) < 64 * EPS for n in want)
        plan = actpass.report(model).plan
        assert [r.chunk_rows for r in plan.regions] == [rows]
        step(torch.compile(model, backend=eager_actcomp({"plan": plan})), model, inputs())
        assert f"in {-(-TOKENS // rows)} chunks" in notes(model)
    for bad in (0, 8, -128, 2.0, "128"):
        with pytest.raises(actpass.OptionError, match="Allowed: True, False, or the rows of a chunk"):
            run(model, chunked_loss=bad)

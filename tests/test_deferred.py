"""Logits that are returned beside a loss in pieces: computed when they are read, and the logits in everything else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

import actpass
from actpass import DeferredLogits
from actpass.memory.profiler import measure

from .helpers import EPS, Grads, eager_actcomp, error, grads_of
from .test_chunking import TOKENS, WIDTH, WORDS, flat, inputs, notes, of_length

Logits = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """An embedding, a hidden layer, a head; returns the loss and the logits."""

    def __init__(self, logits: Logits | None = None, *, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.logits = logits

    def state(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(self.embed(x)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        h = self.state(x)
        logits = self.head(h) if self.logits is None else self.logits(self, h)
        return flat(logits.float(), y) + 0 * self.scale.sum(), logits


WAYS: dict[str, Logits] = {
    "head": lambda m, h: m.head(h),
    "capped": lambda m, h: 30 * torch.tanh(m.head(h) / 30),
    "scaled": lambda m, h: m.head(h) * m.scale.exp(),
    "sliced": lambda m, h: m.head(h[:, slice(0, None), :]),
    "matmul": lambda m, h: torch.matmul(h, m.head.weight.t()) + m.head.bias,
    "flattened": lambda m, h: m.head(h.flatten(0, 1)).view(*h.shape[:2], -1),
    "cast": lambda m, h: m.head(h).float(),
    "adapted": lambda m, h: m.head(h) + F.linear(F.linear(h, m.hidden.weight[:4]), m.head.weight[:, :4]),
}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=eager_actcomp({"policy": "exact", **options}))


def f_of(logits: torch.Tensor) -> torch.Tensor:
    """A distillation's and a z-loss."""
    target = torch.linspace(0, 1, WORDS).softmax(-1)
    return F.kl_div(logits.float().log_softmax(-1), target.expand_as(logits), reduction="batchmean") + (
        0.1 * logits.float().logsumexp(-1).square().mean()
    )


def gradients(model: nn.Module, function: Any, f: Any = f_of) -> tuple[torch.Tensor, Grads]:
    model.zero_grad(set_to_none=True)
    loss, logits = function(**inputs())
    (loss + f(logits)).backward()
    return loss.detach(), grads_of(model)


def deferred(model: nn.Module, **options: Any) -> tuple[torch.Tensor, DeferredLogits]:
    loss, logits = compiled(model, **options)(**inputs())
    assert isinstance(logits, DeferredLogits)
    assert not logits.is_read
    return loss, logits


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_value_and_gradient_are_those_of_logits(name: str):
    model = Model(WAYS[name])
    want_loss, want_logits = model(**inputs())
    loss, logits = deferred(model)
    assert logits.shape == want_logits.shape
    assert logits.stride() == want_logits.stride()
    assert torch.equal(logits, want_logits)
    assert error(loss, want_loss) < 4 * EPS
    _, want = gradients(model, model)
    _, found = gradients(model, compiled(model))
    assert "chunks" in notes(model)
    for key in want:
        assert error(found[key], want[key]) < 300 * EPS, key  # sums of 300 rows in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name != "flattened"])
def test_lengths_that_change(name: str):
    """Value and gradient of each length are those of its logits; one that is not read takes no trace."""
    model = Model(WAYS[name])
    function = torch.compile(model, backend=eager_actcomp({"policy": "exact"}), dynamic=True)
    for batch, length in ((4, 75), (4, 120), (3, 40)):
        given = of_length(batch, length)
        want_loss, want_logits = model(**given)
        loss, logits = function(**given)
        assert isinstance(logits, DeferredLogits)
        assert not logits.is_read
        assert logits.shape == want_logits.shape
        assert torch.equal(logits, want_logits)
        assert error(loss, want_loss) < 4 * EPS
        found: list[Grads] = []
        for f in (model, function):
            model.zero_grad(set_to_none=True)
            loss, logits = f(**given)
            (loss + f_of(logits)).backward()
            found.append(grads_of(model))
        for key in found[0]:
            assert error(found[1][key], found[0][key]) < 300 * EPS, (key, length)
    assert "chunks" in notes(model)


def test_lengths_that_change_under_autocast():
    """Read outside of it, which is where they are traced."""
    model = Model()
    function = torch.compile(model, backend=eager_actcomp({"policy": "exact"}), dynamic=True)
    for length in (75, 120, 40):
        given = of_length(4, length)
        with torch.autocast("cpu", torch.bfloat16):
            _, want = model(**given)
            loss, logits = function(**given)
        assert isinstance(logits, DeferredLogits)
        read = logits.detach() + 0
        assert read.dtype == logits.dtype == torch.bfloat16
        assert torch.equal(read, want)
        (loss + logits.float().square().mean()).backward()


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (True, True)])
def test_tied_weights_and_biases(tied: bool, bias: bool):
    model = Model(tied=tied, bias=bias)
    _, want = gradients(model, model)
    _, found = gradients(model, compiled(model))
    for key in want:
        assert error(found[key], want[key]) < 300 * EPS, key


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision(how: str):
    model = Model(WAYS["capped"])
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        _, logits = deferred(model)
        assert logits.dtype == torch.bfloat16
        _, want_logits = model(**inputs())
        function = compiled(model)
        model.zero_grad()
        loss, given = function(**inputs())
    assert torch.equal(logits, want_logits)  # read outside of autocast
    (loss + f_of(given)).backward()
    found = grads_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        _, want = gradients(model, model)
    for key in want:
        assert error(found[key], want[key]) < 2**-6, key


@pytest.mark.short_tier
def test_the_loss_is_that_of_a_model_that_returns_it_alone():
    class LossOnly(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **given: Any) -> torch.Tensor:
            return self.model(**given)[0]

    model = Model()
    alone = LossOnly(model)
    want_loss = compiled(alone)(**inputs())
    want_loss.backward()
    want = grads_of(model)
    loss, found = gradients(model, compiled(model), lambda _: 0)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_backward_twice_and_accumulated():
    model = Model()
    function = compiled(model)
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        loss, logits = function(**inputs())
        (loss + f_of(logits)).backward()
    found = grads_of(model)
    _, want = gradients(model, model)
    for key in want:
        assert error(found[key], 2 * want[key]) < 300 * EPS, key
    _, logits = function(**inputs())
    logits.logsumexp(-1).sum().backward(inputs=[model.head.weight])  # of the head alone
    assert model.head.weight.grad is not None


def test_a_metric_reads_once_and_a_loss_keeps_nothing():
    _, logits = deferred(Model())
    f_of(logits).backward()
    assert not logits.is_read
    with torch.no_grad():
        logits.logsumexp(-1)
    assert logits.is_read
    kept = logits.read
    assert torch.equal(logits.argmax(-1), kept.argmax(-1))
    assert logits.read is kept


def test_aliases_copies_and_casts_are_not_read():
    model = Model()
    _, want = model(**inputs())
    _, logits = deferred(model)
    shown = [logits.detach(), logits.double(), logits.clone(), logits.to("cpu", torch.float16).float(), logits.data]
    assert all(isinstance(x, DeferredLogits) and not x.is_read for x in (logits, *shown))
    assert [x.dtype for x in shown] == [torch.float32, torch.float64, torch.float32, torch.float32, torch.float32]
    assert not shown[0].requires_grad
    assert shown[1].requires_grad
    assert torch.equal(shown[3], want.half().float())
    assert torch.equal(shown[1], want.double())
    assert not logits.is_read
    shown[2].mul_(2)  # a copy has memory of its own, an alias has not
    shown[0].add_(1)
    assert torch.equal(logits, want + 1)
    assert torch.equal(shown[2], 2 * want)


def test_a_copy_is_of_what_was_there_when_it_was_copied():
    model = Model()
    want = model(**inputs())[1].detach()
    logits = deferred(model)[1].detach()
    copies = [logits.clone(), logits.double(), logits.clone().clone()]
    logits[..., 0] = -1e9
    assert all(torch.equal(c, want.to(c.dtype)) for c in copies)
    one = deferred(model)[1].detach().clone()
    other = one.clone()
    one.read.mul_(2.0)  # what it shows may be written to by whoever has it
    assert torch.equal(other, want)
    with_gradient = deferred(model)[1]
    copy = with_gradient.clone()
    with_gradient.mul_(2.0)
    (found,) = torch.autograd.grad(copy.square().mean(), [model.head.weight])
    (right,) = torch.autograd.grad(model(**inputs())[1].square().mean(), [model.head.weight])
    assert error(found, right) < 300 * EPS


def test_logits_without_a_gradient_come_without_one():
    class Detached(Model):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            loss, logits = super().forward(*args, **kwargs)
            return loss, logits.detach()

    model = Detached()
    loss, logits = deferred(model)
    assert not logits.requires_grad
    assert logits.numpy().shape == logits.shape
    (loss + logits.square().mean()).backward()
    found = grads_of(model)
    model.zero_grad()
    model(**inputs())[0].backward()
    assert all(error(found[n], g) < 300 * EPS for n, g in grads_of(model).items())


def test_a_first_call_inside_a_checkpoint():
    model = Model()
    run = compiled(model)

    def call() -> Any:
        loss, logits = run(**inputs())
        return loss + f_of(logits)

    torch.utils.checkpoint.checkpoint(call, use_reentrant=False).backward()
    found = grads_of(model)
    _, want = gradients(model, model)
    assert all(error(found[n], g) < 300 * EPS for n, g in want.items())


def test_it_is_an_ordinary_tensor_to_what_reads_memory():
    model = Model()
    _, want = model(**inputs())
    _, logits = deferred(model)
    plain = logits.detach()
    assert (plain.numpy() == want.detach().numpy()).all()
    assert plain[0, 0].tolist() == want[0, 0].tolist()
    assert repr(plain) == repr(want.detach())
    assert "grad_fn" in repr(logits)
    for copied in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), pickle.loads(pickle.dumps(logits))):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, want)
    file = io.BytesIO()
    torch.save({"logits": plain}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["logits"], want)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(logits)
    with pytest.raises(RuntimeError, match="requires grad"):
        logits.numpy()


def test_what_is_written_to_it_stays():
    model = Model()
    _, want = model(**inputs())
    _, logits = deferred(model)
    logits[:, 0] = 0
    logits.mul_(2)
    want = want.detach().clone()
    want[:, 0] = 0
    assert torch.equal(logits, 2 * want)
    logits.sum().backward()  # not through what was overwritten
    rows = TOKENS - len(want)
    assert torch.equal(model.head.bias.grad, torch.full((WORDS,), 2.0 * rows))


def test_a_compiled_function_takes_it():
    model = Model()
    loss, logits = deferred(model)
    labels = inputs()["y"]
    metric = torch.compile(lambda z, y: (flat(z, y), z.argmax(-1)), backend="aot_eager")
    found, best = metric(logits, labels)
    assert torch.equal(best, logits.argmax(-1))
    model.zero_grad(set_to_none=True)
    (found + 0 * loss).backward()
    got = grads_of(model)
    model.zero_grad(set_to_none=True)
    (flat(model(**inputs())[1], labels) + 0 * model.scale.sum()).backward()
    for key, want in grads_of(model).items():
        assert error(got[key], want) < 300 * EPS, key


def test_a_step_before_it_is_read_changes_nothing():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, want = model(**inputs())
    loss, logits = deferred(model)
    cast = logits.detach().double()
    loss.backward()
    optimizer.step()
    assert not logits.is_read  # the head's weights were copied
    assert not torch.equal(model(**inputs())[1], want)
    optimizer.step()
    assert torch.equal(logits, want)
    assert torch.equal(cast, want.double())


def test_a_step_computes_logits_that_take_less_than_the_weights():
    model = Model()
    given = {name: x[:1, :17] for name, x in inputs().items()}
    _, want = model(**given)
    loss, logits = compiled(model, chunked_loss=16)(**given)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert logits.is_read
    assert torch.equal(logits, want)


def test_weights_that_change_otherwise_are_an_error_when_it_is_read():
    model = Model()
    _, logits = deferred(model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(actpass.DeferredError, match=r"changed in place since the forward.*defer_logits"):
        logits.argmax(-1)


class Breaks(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss, logits = super().forward(x, y)
        torch._dynamo.graph_break()
        return loss, logits + 1


class Writes(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss, logits = super().forward(x, y)
        logits[:, 0] = 0
        return loss, logits


class Drops(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = F.dropout(self.head(self.state(x)), 0.5)
        return flat(logits, y), logits


class Reads(Model):
    """Its head's input is read by a matmul behind the logits."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = self.head(self.state(x))
        return flat(self.head(logits[..., :WIDTH]), y), logits


WHOLE = [
    (Breaks, {}, "a graph break follows"),
    (Writes, {}, "written in place"),
    (Drops, {}, "draws random numbers"),
    (Reads, {}, ""),
    (Model, {"defer_logits": False}, "defer_logits=False keeps them so"),
    (Model, {"chunked_loss": False}, ""),
    (Model, {"memory_budget": 1.0}, ""),
]


@pytest.mark.parametrize(("build", "options", "reason"), WHOLE)
def test_what_can_not_be_deferred_is_whole_with_its_reason(build: Any, options: dict[str, Any], reason: str):
    model = build()
    torch.manual_seed(1)
    loss, logits = compiled(model, **options)(**inputs())
    assert type(logits) is torch.Tensor
    assert reason in notes(model), notes(model)
    (loss + 0 * model.scale.sum() + 0 * logits.sum()).backward()
    if build is not Drops:
        found = grads_of(model)
        model.zero_grad(set_to_none=True)
        (model(**inputs())[0] + 0 * model.scale.sum()).backward()
        for key, want in grads_of(model).items():
            assert error(found[key], want) < 300 * EPS, key


def test_a_loss_that_can_not_be_in_pieces_leaves_the_logits_whole():
    class OfAll(Model):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            logits = self.head(self.state(x))
            return (logits - logits.mean((0, 1), keepdim=True)).logsumexp(-1).square().mean(), logits

    model = OfAll()
    _, logits = compiled(model)(**inputs())
    assert type(logits) is torch.Tensor
    assert "formed whole: the logits are also returned to the caller: " in notes(model)
    with torch.no_grad():
        _, logits = compiled(model)(**inputs())
    assert type(logits) is torch.Tensor


def test_a_forward_without_a_loss_is_left_alone():
    class NoLoss(Model):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return self.head(self.state(x))

    model = NoLoss()
    logits = compiled(model)(**inputs())
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, model(**inputs()))


@pytest.mark.slow
def test_a_plan_is_followed_with_deferred_and_with_whole_logits():
    model = Model()
    for options in ({}, {"defer_logits": False}):
        loss, _ = compiled(model, **options)(**inputs())
        loss.backward()
        plan = actpass.report(model).plan
        torch.compiler.reset()
        loss, logits = torch.compile(model, backend=eager_actcomp({"plan": plan}))(**inputs())
        assert isinstance(logits, DeferredLogits) == (not options)
        loss.backward()
        torch.compiler.reset()


@pytest.mark.slow
def test_low_bit_forms_and_a_budget():
    model = Model()
    _, want = gradients(model, model)
    for options in ({"policy": "auto", "min_tensor_bytes": 0}, {"policy": "auto", "memory_budget": 0.3}):
        _, found = gradients(model, compiled(model, **options))
        for key in want:
            assert error(found[key], want[key]) < 0.1, key


def test_the_option_is_checked():
    with pytest.raises(actpass.OptionError, match="Allowed: True or False"):
        eager_actcomp({"defer_logits": 1})


@pytest.mark.codegen
@pytest.mark.short_tier
def test_compiled_it_costs_one_hidden_state():
    """By Inductor; the second time from its caches. Logits of 2.4 MB, a hidden state of 115 kB."""
    model, batch = Model(), {name: x.repeat(1, 4) for name, x in inputs().items()}
    hidden = 4 * batch["x"].numel() * WIDTH

    def alone(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        return (model(x, y)[0],)

    def peak(function: Any) -> tuple[int, torch.Tensor]:
        def step() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            loss, *_ = function(**batch)
            loss.backward()
            return loss.detach()

        step()
        memory = measure(step)
        return memory.peak_bytes, memory.result

    options = {"policy": "exact"}
    want, loss = peak(torch.compile(alone, backend="actcomp", options=options))
    for _ in range(2):
        torch.compiler.reset()
        function = torch.compile(model, backend="actcomp", options=options)
        found, other = peak(function)
        assert found <= 1.03 * want + hidden
        assert torch.equal(other, loss)
        logits = function(**batch)[1]
        assert isinstance(logits, DeferredLogits)
        torch.testing.assert_close(logits, model(**batch)[1])

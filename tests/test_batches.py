"""Learned bases that are drawn in batches, and sketches that are taken in batches, are those that are made one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.codecs import LEARNED
from actpass.codecs.projections.learned import first_state, sample_tokens, sketch, sketch_of
from actpass.diagnostics.explain import explain_model
from actpass.passes import in_batches
from actpass.passes.in_batches import batches
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import assert_close, eager_actcomp, step
from .test_learned import N, R, key, points, tokens
from .test_subspaces import optimizer_step, subspaces

methods = pytest.mark.parametrize("name", LEARNED)
ALL = {"rank": 0.5, "skip_unprofitable": False, "min_tensor_bytes": 0}


def test_batches_are_of_one_kind_in_order_and_within_the_limit():
    made = list(batches([3, 8, 1, 2, 5, 20, 4], lambda n: n % 2, lambda n: n, 10))
    assert made == [[8, 2], [20], [3, 1, 5], [4]]
    assert list(batches([1, 1], lambda n: n, lambda n: n, 0)) == [[1], [1]]


@methods
@pytest.mark.parametrize("of_each", [False, True])
def test_a_batch_of_bases_is_the_bases(name: str, of_each: bool):
    method = LEARNED[name]
    states = [first_state(method, key(i), N, R) for i in range(3)]
    noises = [method.noise(key(7), N, R, i if of_each else 0) for i in range(3)]
    want = torch.stack([method.draw(s, n, R) for s, n in zip(states, noises, strict=True)])
    noise = None if noises[0] is None else torch.stack(noises) if of_each else noises[0]
    torch.testing.assert_close(method.draw(torch.stack(states), noise, R), want, atol=2e-5, rtol=1e-4)


@methods
def test_a_batch_of_sketches_is_the_sketches(name: str):
    states = [first_state(LEARNED[name], key(i), N, R) for i in range(3)]
    samples = torch.stack([sample_tokens(tokens(i), points(64)) for i in range(3)])
    want = torch.stack([sketch(tokens(i), states[i], points(64)) for i in range(3)])
    torch.testing.assert_close(sketch_of(samples, torch.stack(states)), want)


def few_steps(method: str, compile: Callable[[nn.Module, Any], Any], **options: Any) -> list[Any]:
    torch.compiler.reset()
    STEP_COUNTER.steps = 0
    model, inputs = models.transformer()
    run, found = compile(model, {**ALL, **options, "projection": method}), list[Any]()
    for _ in range(3):
        loss, grads = step(run, model, inputs)
        found.append((loss, grads, {n: s.sketched for n, s in subspaces(model).items()}))
        optimizer_step()
        model.zero_grad()
    return found


def interpreted(model: nn.Module, options: Any) -> Any:
    return torch.compile(model, backend=eager_actcomp(options))


def expensive(method: str) -> int:
    """Matmuls and factorisations of a step."""
    model, inputs = models.transformer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", actpass.ActpassWarning)
        (region,) = explain_model(model, (), inputs, {**ALL, "projection": method}).regions
    graphs = (region.forward.graph, region.backward.graph)
    return sum("mm" in str(n.target) or "linalg" in str(n.target) for graph in graphs for n in graph.nodes)


@pytest.mark.slow
def test_batches_take_fewer_products(launches: None, monkeypatch: pytest.MonkeyPatch):
    single = expensive("prac")
    monkeypatch.setattr(in_batches, "_SHARE", 1)
    assert expensive("prac") < 0.6 * single


@pytest.mark.slow
@methods
def test_three_steps_in_batches_are_three_steps_one_by_one(name: str, launches: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_batches, "_SHARE", 1)
    together = few_steps(name, interpreted)
    monkeypatch.setattr(in_batches, "launches_cost", lambda _: False)
    for (loss, grads, sketches), (want_loss, want, want_sketches) in zip(together, few_steps(name, interpreted), strict=True):
        torch.testing.assert_close(loss, want_loss)
        assert_close(grads, want, 1e-4)
        assert sketches.keys() == want_sketches.keys()
        for path, sketched in sketches.items():
            assert (sketched is None) == (want_sketches[path] is None)
            if sketched is not None:
                torch.testing.assert_close(sketched, want_sketches[path], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("activation_rank", [None, 0.4])
@pytest.mark.parametrize("name", ["oasis", "prac"])
def test_generated_code_takes_batches(
    name: str, activation_rank: float | None, launches: None, monkeypatch: pytest.MonkeyPatch
):
    """Where the sampled tokens are in many tensors and their number is a symbol."""
    monkeypatch.setattr(in_batches, "_SHARE", 1)
    got = few_steps(name, lambda m, o: torch.compile(m, backend="actcomp", options=o), activation_rank=activation_rank)
    want = few_steps(name, interpreted, activation_rank=activation_rank)
    for (loss, grads, _), (want_loss, want_grads, _) in zip(got, want, strict=True):
        torch.testing.assert_close(loss, want_loss)
        assert_close(grads, want_grads, 1e-3)

"""Architectures from `transformers`, each from a tiny config: exact stays exact, and only what the report says changes.

The partitioned graphs are interpreted (`eager_actcomp`): what Inductor makes of them is not the subject.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import actpass

from . import models
from .helpers import EPS, Grads, assert_close, assert_equal, eager_actcomp, projected, step

NAMES = tuple(models.HUGGING_FACE)

# fp32. On the way from the loss to a gradient lie some 100 operators a layer. Each rounds its result once, relative error
# at most EPS / 2, and independent roundings add in squares: sqrt(100) EPS / 2 = 5 EPS. Three times this for reductions
# in another order: 16 EPS = 1.9e-6. A wrong gradient is off by 1e-1 and more.
EXACT = 16 * EPS
# At full rank P P^T = I to rounding: z = x P and the lift each round sums of N <= 61 terms, sqrt(N) EPS / 2 = 4 EPS
# relative to |x| |dy|, which is up to sqrt(T) = 6 times |dW|: 4 x 6 x sqrt(2) = 34 EPS more.
FULL_RANK = EXACT + 34 * EPS
# Linear layers in each: 7 a Llama layer and a head; 4 in GPT-2, whose head is tied to the embedding, as BERT's and T5's
# are; T5 has 7 in the encoder and 11 in the decoder. Mixtral's experts on CPU are a custom operator: left alone.
LINEARS = {"llama": 15, "gpt2": 4, "bert": 7, "qwen3": 8, "mixtral": 6, "vit": 7, "t5": 18}


def run(name: str, **options: Any) -> tuple[torch.nn.Module, torch.Tensor, Grads]:
    model, inputs = models.HUGGING_FACE[name]()
    return model, *step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)


@cache
def exact(name: str) -> tuple[torch.Tensor, Grads]:
    """Loss and gradients of ``method="exact"``, once a model: all three tests look at them."""
    return run(name, policy="exact")[1:]


@pytest.mark.architectures
@pytest.mark.short_tier
@pytest.mark.parametrize("name", NAMES)
def test_exact_gives_the_gradients_of_the_model(name: str) -> None:
    model, inputs = models.HUGGING_FACE[name]()
    want_loss, want = step(model, model, inputs)
    loss, grads = exact(name)
    assert float((loss - want_loss).abs() / want_loss) <= EXACT
    assert_close(grads, want, EXACT)


@pytest.mark.architectures
@pytest.mark.parametrize("name", NAMES)
def test_srht_at_full_rank_gives_the_exact_gradients(name: str) -> None:
    want_loss, want = exact(name)
    model, loss, grads = run(name, projection="srht", rank=1.0, skip_unprofitable=False)
    assert len(projected(actpass.report(model))) == LINEARS[name]
    assert torch.equal(loss, want_loss)
    assert_close(grads, want, FULL_RANK)


@pytest.mark.architectures
@pytest.mark.parametrize("name", NAMES)
def test_haar_changes_the_projected_gradients_and_nothing_else(name: str) -> None:
    want_loss, want = exact(name)
    model, loss, grads = run(name, projection="haar", rank=0.25, skip_unprofitable=False)
    touched = projected(actpass.report(model))
    assert len(touched) == LINEARS[name]
    assert touched <= want.keys()
    assert torch.equal(loss, want_loss)
    assert_equal({n: grads[n] for n in want.keys() - touched}, {n: want[n] for n in want.keys() - touched})
    assert not [n for n in touched if torch.equal(grads[n], want[n])]
    # no matrix is silently left as it is (by identity: Dynamo knows T5's shared embedding as the encoder's)
    report = actpass.report(model)
    named = touched | {path for region in report.regions for _, path, _ in region.rejected}
    accounted = {id(model.get_parameter(path)) for path in named}
    assert not [n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in accounted], str(report)

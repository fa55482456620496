"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import actpass
from actpass.codecs import PROJECTIONS
from actpass.codecs.generator import bits32, normals, round_keys, signs, step_seed
from actpass.measure import measure

from . import models
from .helpers import assert_equal, grads_of, projected

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("draw", [bits32, signs, normals])
def test_generator_gives_the_same_bits_on_cuda(draw):
    key = round_keys(step_seed(1, 2))
    want = draw(key, 3, 100_000)
    assert torch.equal(draw(key.cuda(), 3, 100_000).cpu(), want)
    assert torch.equal(torch.compile(draw)(key.cuda(), 3, 100_000).cpu(), want)


@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_projection_changes_only_its_own_gradients_on_cuda(method: str, mode: str | None):
    model, inputs = models.transformer()
    model, inputs = model.cuda(), {k: v.cuda() for k, v in inputs.items()}
    results = []
    for options in ({"method": "exact"}, {"method": method, "rank": 0.25, "profitable_only": False, "mode": mode}):
        torch.compiler.reset()
        actpass.runtime.regions.clear()
        compiled = torch.compile(model, backend="actcomp", options=options)
        for _ in range(4):  # CUDA graphs record on the second and replay from the third
            model.zero_grad(set_to_none=True)
            loss = compiled(**inputs)
            loss.backward()
        results.append((loss.detach().clone(), grads_of(model)))
    touched = projected(actpass.report(model))
    assert touched
    assert torch.equal(results[0][0], results[1][0])
    assert_equal(
        {n: g for n, g in results[1][1].items() if n not in touched},
        {n: g for n, g in results[0][1].items() if n not in touched},
    )


def test_report_saved_bytes_agree_with_the_allocator():
    model, inputs = models.transformer()
    model, inputs = model.cuda(), {k: v.cuda() for k, v in inputs.items()}
    compiled = torch.compile(model, backend="actcomp", options={"method": "rademacher", "rank": 0.25})
    compiled(**inputs).backward()
    alive = measure(lambda: compiled(**inputs), "cuda")
    sites = [s for r in actpass.report(model).regions for s in r.sites if s.bytes_after]
    rounded = sum(-(-s.bytes_after // 512) * 512 for s in sites)
    assert alive.kept_bytes == rounded + 512  # the loss

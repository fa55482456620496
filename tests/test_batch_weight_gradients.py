"""Gradients that are formed in batches are those that are formed one by one, in fewer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from actpass.ir.joint_graph import storage_root
from actpass.ir.op_queries import is_matmul
from actpass.ir.outputs import output_values
from actpass.passes import in_batches
from actpass.pipeline import Compiled

from . import models
from .helpers import assert_close, eager_actcomp, step
from .tracing import JointGraph, trace, traced

pytestmark = pytest.mark.usefixtures("launches")
HAAR = {"projection": "haar", "rank": 0.5, "skip_unprofitable": False, "min_tensor_bytes": 0}


def products(graph: fx.Graph) -> int:
    return sum(map(is_matmul, graph.nodes))


def memories(done: Compiled) -> list[int]:
    """How many gradients lie in each memory that the backward returns."""
    roots = [storage_root(o) for o in output_values(done.backward.graph) if isinstance(o, fx.Node)]
    return sorted(map(roots.count, set(roots)))


class StoredInOut(nn.Module):
    """Weights (in, out), as GPT-2's: the basis is the first factor of their gradients. Three of one shape, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.ParameterList(torch.randn(32, 32) * 0.1 for _ in range(3))
        self.last = nn.Parameter(torch.randn(32, 20) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.square:
            x = torch.tanh(x @ weight)
        return (x @ self.last).square().mean()


def stored_in_out() -> JointGraph:
    torch.manual_seed(0)
    return trace(StoredInOut(), {"x": torch.randn(40, 32)})


@pytest.mark.parametrize(
    ("of", "fewer"),
    [(lambda: traced("transformer"), 12 + 1), (lambda: traced("mixtral"), 5), (stored_in_out, 2)],
    ids=["transformer", "mixtral", "stored in, out"],
)
def test_seeded_bases_of_a_width_take_one_product(of: Callable[[], JointGraph], fewer: int, monkeypatch: pytest.MonkeyPatch):
    """transformer: 13 weights that read 32 numbers, two that read 48. mixtral: its six that are no experts. Stored (in, out),
    only weights of one shape go together."""
    joint = of()
    together = joint.compiled(**HAAR)
    monkeypatch.setattr(in_batches, "MOST", 0)
    single = joint.compiled(**HAAR)
    assert products(single.backward.graph) - products(together.backward.graph) == fewer
    got, want = (joint.run(done.forward, done.backward) for done in (together, single))
    assert all(torch.equal(a, b) for a, b in zip(got.results, want.results, strict=True))
    assert_close(got.gradients, want.gradients, 1e-6)
    assert got.kept == want.kept


@pytest.mark.parametrize("most", [4 * 3 * 48 * 48, 8 * 48 * 48])
def test_a_batch_is_no_larger_than_its_limit(most: int, monkeypatch: pytest.MonkeyPatch):
    joint = traced("transformer")
    monkeypatch.setattr(in_batches, "MOST", most)
    done = joint.compiled(**HAAR)
    of_one_memory: dict[Any, int] = {}
    for o in output_values(done.backward.graph):
        if isinstance(o, fx.Node) and storage_root(o) is not o:
            root = storage_root(o)
            of_one_memory[root] = root.meta["val"].untyped_storage().nbytes()
    assert of_one_memory
    assert max(of_one_memory.values()) <= most
    assert max(memories(done)) > 1


@pytest.mark.parametrize("method", ["oasis", "prac"])
def test_learned_bases_of_a_size_take_one_batched_product(method: str, monkeypatch: pytest.MonkeyPatch):
    options = {**HAAR, "projection": method}
    runs: list[Any] = []
    for most in (in_batches.MOST, 0):
        monkeypatch.setattr(in_batches, "MOST", most)
        torch.compiler.reset()
        model, inputs = models.transformer()
        loss, grads = step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)
        runs.append((loss, grads))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_close(runs[0][1], runs[1][1], 1e-6)

"""Every test starts from the same place: nothing compiled, no region, the clock at zero, seeded, a cache of its own."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # a cold cache each session: no test passes on an older session's graphs
    _cache = tempfile.mkdtemp(prefix="actpass-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import pytest
import torch
from torch._inductor.graph import GraphLowering

from actpass.backend import backend
from actpass.passes import in_batches
from actpass.runtime import state
from actpass.torch_compat import compile_fx, functorch_config

from .helpers import interpret

TIERS = ("codegen", "architectures", "distributed", "gpu", "slow")
"""Markers of what the fast tier leaves out. See CONTRIBUTING.md."""
_RUNS_INDUCTOR = {"codegen", "distributed", "gpu", "slow"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all tiers: also what is marked " + ", ".join(TIERS))
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew; read the diff, then commit it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error::actpass.ActpassWarning")  # a fallback fails the test
    config.addinivalue_line("filterwarnings", "default:actpass was tested on torch:actpass.ActpassWarning")  # a newer torch
    # pytest attaches its handlers to loggers that do not propagate; with a handler on this one torch writes out every graph
    logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the guardrail first, and leave out the slower tiers, if no tier (``-m``), no test by its name and not all is asked
    for."""
    items.sort(key=lambda item: item.path.name != "test_exactness.py")
    named = any("::" in argument for argument in config.args)
    if config.getoption("--all") or config.option.markexpr or named:
        return
    fast = [item for item in items if not any(item.get_closest_marker(tier) for tier in TIERS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(fast)])
    items[:] = fast


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    state.reset()
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that has Inductor generate code belongs to a tier that says so."""
    if any(request.node.get_closest_marker(tier) for tier in _RUNS_INDUCTOR):
        yield
        return
    generated: list[str] = []

    def refused(*_: Any, **__: Any) -> Any:
        generated.append("code")
        raise RuntimeError("this test has Inductor generate code: mark it with codegen")

    monkeypatch.setattr(GraphLowering, "compile_to_module", refused)
    yield
    assert not generated, "this test has Inductor generate code: mark it with codegen"


@pytest.fixture
def no_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="actcomp"`` by its name and with all its options, but its graphs are interpreted: no C++, no cache."""
    monkeypatch.setattr(backend, "compile_fx", functools.partial(compile_fx, inner_compile=interpret))
    with functorch_config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is batched because a GPU's kernels are launched one by one is batched on a CPU, too."""
    monkeypatch.setattr(in_batches, "launches_cost", lambda _: True)

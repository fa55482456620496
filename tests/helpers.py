"""What several test files share: the pass without Inductor's code generation, and how gradients are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch needs it
from torch import fx

from actpass.backend.backend import compile_region
from actpass.diagnostics.interpreter import interpret
from actpass.options import parse
from actpass.reporting import Report
from actpass.torch_compat import compile_fx, functorch_config

EPS = torch.finfo(torch.float32).eps
TORCH_2_11 = torch.__version__.startswith("2.11")
"""Its Inductor fuses otherwise than 2.13's, on a CPU."""
Grads = dict[str, torch.Tensor]


def eager_actcomp(options: Mapping[str, Any] | None = None, **more: Any) -> Callable[..., Any]:
    """A Dynamo backend: ``backend="actcomp"`` with the same pass, whose graphs are interpreted and not compiled.

    A transformer takes seconds in place of half a minute; for tests whose subject is the pass or the runtime.
    """
    config = parse({**(options or {}), **more})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        with functorch_config.patch(enable_autograd_cache=False):
            if not torch.is_grad_enabled():
                return compile_fx(gm, example_inputs, inner_compile=interpret)
            return compile_region(gm, example_inputs, config, inner_compile=interpret)

    return backend


def grads_of(model: torch.nn.Module) -> Grads:
    """A copy of every gradient by name; a parameter that received none fails here and not three lines further down."""
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def step(function: Callable[..., Any], model: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Grads]:
    """One forward and backward from zeroed gradients: (loss, gradients). No optimizer: the clock stays."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(function(**inputs))
    loss.backward()
    return loss.detach().clone(), grads_of(model)


def loss_of(output: Any) -> torch.Tensor:
    """What a model of tests/models.py returned, as a loss."""
    return output if isinstance(output, torch.Tensor) else output.loss


def assert_equal(got: Grads, want: Grads) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    different = [n for n in want if not torch.equal(got[n], want[n])]
    assert not different, f"{len(different)} of {len(want)} differ: {different}"


def assert_close(got: Grads, want: Grads, tolerance: float) -> None:
    """The error of each gradient relative to the largest gradient of its module.

    Not to its own: the gradient of a key's bias is zero in exact arithmetic (softmax ignores a shift), and what is left
    of it is the rounding of the terms that cancel, which are the weight's.
    """
    assert got.keys() == want.keys()
    scale: dict[str, float] = {}
    for name, gradient in want.items():
        module = name.rpartition(".")[0]
        scale[module] = max(scale.get(module, 0.0), float(gradient.double().norm()))
    errors = {n: float((got[n].double() - want[n].double()).norm()) / scale[n.rpartition(".")[0]] for n in want}
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} > {tolerance:.2e}"


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, Frobenius, in double."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny))


def projected(report: Report) -> set[str]:
    """Paths of the parameters whose gradient is formed through a projection, all regions."""
    return {p for region in report.regions for d in region.plan["decisions"] if d["rank"] for p in d["parameters"]}


def in_processes(code: str) -> list[str]:
    """The last line that ``code`` prints, in two processes whose hashes have other seeds."""
    return [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """A folder that ``fill`` has filled, once for all processes that run tests side by side."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            fill(folder)
            (folder / "done").touch()
    return folder

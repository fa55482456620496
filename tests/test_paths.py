"""Paths of modules and parameters are those of ``named_modules``, however Dynamo spells where it found them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.ir.graph_inputs import clean_path


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0", "model.layers.0"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['self'].__dict__['_modules']['base'].__dict__['_modules']['model'].model.layers.0", "base.model.model.layers.0"),
        ("L['self'].__dict__['_modules']['a'].b._modules['c']._parameters['weight']", "a.b.c.weight"),
        ("L['self']._modules['x']._modules['_orig_mod']._modules['_fsdp_wrapped_module']._buffers['state']", "x.state"),
        ("G['model']._modules['head']", "head"),
        ("L['step'].__closure__[0].cell_contents._modules['head']", "head"),
        ("L['self']", ""),
    ],
)  # fmt: skip
def test_a_source_becomes_the_path_that_the_module_has(source: str, path: str):
    assert clean_path(source) == path


class Wrapper(nn.Module):
    """Passes on what it has not, as PEFT's models do: Dynamo then finds its parts in its ``__dict__``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_overrides_match_the_real_paths_behind_a_wrapper():
    model = Wrapper(Wrapper(Layers()))
    known = {name for name, _ in model.named_modules()}
    pattern = "inner.inner.layers.1"
    assert pattern in known
    options: dict[str, Any] = {"codec": "int8", "min_tensor_bytes": 0, "module_overrides": {pattern: "save"}}
    report = actpass.explain(model, torch.randn(256, 64), options=options)
    sites = report.regions[0].sites
    stored = {s.module: s.codec for s in sites if s.bytes_after}
    assert stored.keys() <= known
    assert stored["inner.inner.layers.0.1"] is None  # read by the weight gradient of the layer that is named
    assert stored["inner.inner.layers.2.0"] == "int8"
    assert stored["inner.inner.layers.1.1"] is None
    assert not [note for note in report.regions[0].notes if "decided no site" in note]

"""Low-bit forms of a part of a wider tensor, whose rows have gaps between them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.options import options_for

from .helpers import eager_actcomp, error


class Parts(nn.Module):
    """A part of what one layer makes is stored beside a whole tensor of the same shape, whose code it must not share."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back, self.norm = nn.Linear(128, 292), nn.Linear(128, 128), nn.LayerNorm(128)
        self.register_buffer("scale", torch.rand(292) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.back(F.silu((self.wide(self.norm(x)) * self.scale)[..., 4:132]))
        return x.square().mean()


@pytest.mark.architectures
def test_a_mixer_that_slices_a_wide_projection_is_stored_in_less_than_a_third():
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=32,
        max_position_embeddings=128, use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    model = FalconH1ForCausalLM(config).train()
    report = actpass.explain(model, input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens))
    assert report.regions
    assert all(r.active for r in report.regions)
    assert report.totals.saved_bytes <= 0.3 * report.totals.saved_bytes_default


@pytest.mark.parametrize("method", ["int16", "int8", "int4"])
def test_a_part_with_gaps_is_coded(method: str):
    expected, x = Parts(), torch.randn(2, 64, 128)
    model = copy.deepcopy(expected)
    expected(x).backward()
    options = {**options_for(method), "min_tensor_bytes": 0, "rounding": "nearest"}
    torch.compile(model, backend=eager_actcomp(options))(x).backward()
    report = actpass.report(model)
    assert report.active
    parts = [s for s in report.regions[0].plan["storages"] if "slice" in s["node"] and s["shape"] == [2, 64, 128]]
    assert {s["codec"] for s in parts} == {method}
    limit = {"int16": 1e-3, "int8": 0.05, "int4": 0.5}[method]
    assert error(model.wide.weight.grad, expected.wide.weight.grad) < limit

"""What loops read and write: as predicted, and what codes add to it on a GPU. CUDA tensors are fake: no device is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.analysis.saved_tensors import is_read_by_loops
from actpass.memory.liveness import _padded_bytes, timeline
from actpass.plan import SavedTensor
from actpass.torch_compat import FakeTensorMode

T, N = 64, 96


def traced(function: Callable[..., Any], *shapes: tuple[int, ...], device: str = "cpu") -> fx.GraphModule:
    """``function`` of bfloat16 tensors, from fake ones on ``device``."""
    with FakeTensorMode():
        values = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        return make_fx(function)(*values)


def saved(joins: tuple[bool, bool] | None) -> SavedTensor:
    return SavedTensor("x", ("x",), "x", 1000, ("linear",), linear=True, paths=(), obstacle=None, joins=joins)


@pytest.mark.parametrize(
    ("joins", "traffic"),
    [
        (None, 2 * (1000 + 500)),  # read and written to be coded, and to be decoded
        ((False, False), 2 * (1000 + 500)),
        ((True, False), 500 + 1500),  # the kernel that makes it writes the codes, too
        ((False, True), 1500 + 500 - 1000),  # what reads it reads the codes in its place
        ((True, True), 500 + 500 - 1000),
    ],
)
def test_codes_move_what_kernels_of_their_own_read_and_write(joins: tuple[bool, bool] | None, traffic: int):
    assert saved(joins).traffic(500) == traffic


def test_codes_never_count_as_a_gain():
    assert saved((True, True)).traffic(100) == 0


def test_loops_read_codes_and_library_kernels_do_not():
    def backward(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.relu(x) * 2.0, (y.view(-1, N) * y.view(-1, N).sum(-1, keepdim=True)).exp(), z.t() @ torch.relu(z)

    x, y, z = traced(backward, (T, N), (T, N), (T, N)).graph.find_nodes(op="placeholder")
    assert is_read_by_loops(x)
    assert is_read_by_loops(y)
    assert not is_read_by_loops(z)


def test_traffic_is_what_each_loop_reads_and_writes():
    """Two loops: one reads x and w and writes h; one reads the product and h, and writes the result. The matmul is none."""

    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x) + x
        return torch.relu(h @ w) * h

    found = timeline(traced(forward, (T, N), (N, N)))
    whole = T * N * 2
    assert found.kernels == 3
    assert found.traffic == 2 * whole + 3 * whole


@pytest.mark.parametrize(
    ("shape", "dtype", "padded"),
    [
        ((8, 2736), torch.bfloat16, (7 * 2752 + 2736) * 2),  # lines of 128 bytes
        ((2, 4, 2736), torch.bfloat16, (7 * 2752 + 2736) * 2),
        ((8, 2736), torch.uint8, 7 * 2816 + 2736),
        ((8, 2752), torch.bfloat16, 8 * 2752 * 2),
        ((8, 1000), torch.bfloat16, 8 * 1000 * 2),  # short rows stay
    ],
)
def test_on_a_gpu_long_rows_are_padded_to_whole_lines(shape: tuple[int, ...], dtype: torch.dtype, padded: int):
    with FakeTensorMode():
        node = fx.Graph().placeholder("x")
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="cuda")
        assert _padded_bytes(node) == padded
        node.meta["val"] = torch.empty(shape, dtype=dtype)
        assert _padded_bytes(node) == torch.empty(shape, dtype=dtype).nbytes

"""Every low-bit form: unbiased, with the variance of its closed form, whole for any shape and value, fused by Inductor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actpass.codecs import QUANTIZERS, Groups
from actpass.codecs.generator import round_keys, rounding_noise, step_seed
from actpass.codecs.quantizers.integer import Integer
from actpass.codecs.quantizers.quantizer import PAYLOAD_DTYPES, Quantizer
from actpass.errors import PluginError
from actpass.torch_compat import run_and_get_code

from .helpers import TORCH_2_11

SEEDS = 256
codecs = pytest.mark.parametrize("name", QUANTIZERS)


def groups_of(name: str, shape: tuple[int, ...], group: int | None = None) -> Groups:
    groups = Groups.of(shape, group or QUANTIZERS[name].group, QUANTIZERS[name].pieces)
    assert groups is not None  # no symbolic sizes here
    return groups


def noise_of(groups: Groups, seed: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    if seed is None:
        return None
    rows, columns = rounding_noise(round_keys(step_seed(0, seed)), [groups.rows, groups.columns])
    return rows, columns


def round_trip(name: str, x: torch.Tensor, seed: int | None, *, group: int | None = None, rotate: bool = False) -> torch.Tensor:
    codec, groups = QUANTIZERS[name], groups_of(name, tuple(x.shape), group)
    payload = codec.encode(x, groups, noise_of(groups, seed), rotate=rotate)
    assert sum(t.numel() * t.element_size() for t in payload) == codec.payload_bytes(math.prod(groups.shape), groups.group)
    return codec.decode(*payload, groups, x.shape, x.dtype, rotate=rotate)


def scale_of(name: str, x: torch.Tensor) -> torch.Tensor:
    """Of each element, in float64."""
    codec, groups = QUANTIZERS[name], groups_of(name, tuple(x.shape))
    _, scale = codec.encode(x, groups, None)
    spread = scale.float().unsqueeze(-1).expand(*scale.shape, groups.group).flatten(-2)
    return groups.restore(groups.join(spread), x.shape).double()


def around(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the two codes around each element, below <= x < above."""
    scale = scale_of(name, x)
    below, above = QUANTIZERS[name].neighbours(x.double() / scale.clamp_min(1e-300))
    return below * scale, above * scale


def step_of(name: str, x: torch.Tensor) -> torch.Tensor:
    """The distance between the two codes around each element."""
    below, above = around(name, x)
    return above - below


@codecs
def test_stochastic_rounding_is_unbiased_with_the_closed_variance(name: str):
    torch.manual_seed(0)
    x = torch.randn(24, 96) * torch.logspace(-3, 3, 24).unsqueeze(1)
    below, above = around(name, x)
    step = above - below
    fraction = (x.double() - below) / step
    variance = step**2 * fraction * (1 - fraction)
    error = torch.zeros_like(step)
    squares = torch.zeros_like(step)
    for seed in range(SEEDS):
        difference = round_trip(name, x, seed).double() - x.double()
        error += difference
        squares += difference**2
    z = (error / SEEDS / (variance / SEEDS).sqrt().clamp_min(1e-12))[fraction * (1 - fraction) > 0.01]
    assert z.abs().max() < 4.9  # about 2300 entries at once
    assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
    assert float((squares / SEEDS / step**2).sum() / (variance / step**2).sum()) == pytest.approx(1.0, rel=0.05)


@codecs
def test_the_codes_around_a_value_are_those_that_rounding_finds(name: str):
    codec = QUANTIZERS[name]
    torch.manual_seed(0)
    few = torch.cat([torch.rand(200).double() * 1.9 - 0.95, torch.logspace(-3, -0.1, 40).double()]) * codec.largest
    below, above = codec.neighbours(few)
    assert ((below <= few) & (few < above)).all()
    if codec.bits < 16:  # 16 bits are finer than what is tried
        found = Quantizer.neighbours(codec, few)
        assert torch.equal(found[0], below.clamp_min(-codec.largest))
        assert torch.equal(found[1], above.clamp_max(codec.largest))
    nearest = codec.unpack(codec.pack([codec.round(few.float(), None)] * codec.pieces))[0].double()
    assert ((nearest == below) | (nearest == above)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int16])
def test_a_payload_of_another_dtype_is_refused(dtype: torch.dtype):
    class Wide(Integer):
        def pack(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
            return codes[0].to(dtype)

    with pytest.raises(PluginError, match=r"packs 1 codes of 8 bits into .* Allowed: one of uint8, int8, int16"):
        Wide(8, 255, 64).encode(torch.randn(4, 64), groups_of("int8", (4, 64)), None)


@codecs
def test_elements_of_a_group_and_of_a_byte_are_rounded_independently(name: str):
    x = torch.full((8, 128), 0.3)
    x[:, ::32] = 1.0
    below, above = around(name, x)
    halves = ((below + above) / 2).float()
    between = x != 1.0
    x = torch.where(between, halves, x)
    noise = torch.stack([(round_trip(name, x, seed) - x)[between] for seed in range(SEEDS)])
    correlation = torch.corrcoef(noise.T).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / SEEDS**0.5
    assert correlation.square().mean() * SEEDS == pytest.approx(1.0, abs=0.05)


@codecs
@pytest.mark.parametrize("rotate", [False, True])
def test_nearest_is_at_most_half_a_step_off_and_repeats(name: str, rotate: bool):
    torch.manual_seed(0)
    x = torch.randn(32, 128)
    got = round_trip(name, x, None, rotate=rotate)
    assert torch.equal(got, round_trip(name, x, None, rotate=rotate))
    if not rotate:
        rounding = 2.0 ** (QUANTIZERS[name].bits - 24)  # of float32, in steps
        assert ((got - x).abs().double() <= step_of(name, x) * (0.5 + 1e-4 + rounding)).all()


@pytest.mark.parametrize("name", ["int16", "int8", "int4", "int2"])  # fp8 has the range as it is
def test_rotation_spreads_outliers(name: str):
    """One large element in each group takes the precision of its neighbours; rotated, it does not."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    x[:, ::32] *= 100
    small = torch.ones_like(x, dtype=torch.bool)
    small[:, ::32] = False
    plain, rotated = (((round_trip(name, x, None, rotate=r) - x)[small]).norm() for r in (False, True))
    assert rotated < plain


finite = st.floats(min_value=-(2.0**127), max_value=2.0**127, width=32)


@codecs
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_finite_value_comes_back_finite_and_near(name: str, data: st.DataObject):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=0, max_size=3)))
    count = math.prod(shape)
    few = data.draw(st.lists(finite, min_size=1, max_size=8))
    x = torch.tensor(few, dtype=torch.float32).repeat(-(-count // len(few)))[:count].view(shape)
    for seed in (None, 1):
        got = round_trip(name, x, seed)
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        assert torch.isfinite(got).all()
        tiny = 1e-35  # below, a group is stored as zeros
        assert ((got.double() - x.double()).abs() <= step_of(name, x) * (1 + 1e-3) + tiny).all()


@codecs
def test_zeros_and_denormals_stay_tiny(name: str):
    for value in (0.0, 1e-40, -1e-38):
        got = round_trip(name, torch.full((3, 64), value), 0)
        assert got.abs().max() < 1e-36
        assert value or name == "int2" or not got.any()  # int2 has no code for zero


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n != "int2"])  # which has no code for zero
def test_zero_among_others_stays_zero(name: str):
    x = torch.randn(16, 128)
    x[:, 1::2] = 0.0
    assert not round_trip(name, x, 3)[:, 1::2].any()


@codecs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rotate", [False, True])
def test_nan_and_inf_are_not_silenced_and_stay_in_their_group(name: str, bad: float, rotate: bool):
    x = torch.randn(4, 128)
    x[1, 40] = bad
    got = round_trip(name, x, 0, group=32, rotate=rotate)
    assert not torch.isfinite(got[1, 40])
    assert torch.isfinite(got[[0, 2, 3]]).all()
    assert torch.isfinite(got[1, :32]).all()


@pytest.mark.parametrize("name", ["int16", "int8", "int4", "int2"])
def test_codes_survive_packing(name: str):
    codec = QUANTIZERS[name]
    assert isinstance(codec, Integer)
    steps = torch.randint(0, codec.levels, (codec.pieces, 5, 32)).float() - codec.largest
    assert torch.equal(codec.unpack(codec.pack(codec.round(steps, None).unbind())), steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types_keep_their_type(dtype: torch.dtype):
    x = torch.randn(8, 64, dtype=dtype)
    got = round_trip("int8", x, None)
    assert got.dtype == dtype
    assert (got.double() - x.double()).abs().max() < 0.05


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((8, 1376), 32, ((8, 1376), 32, 0)),
        ((7, 1024), 32, ((7, 1024), 32, 1)),  # the rows are odd: the columns are split
        ((7, 172), 32, ((38, 32), 32, 0)),  # merged, and 43 groups of 28 don't halve: padded
        ((2, 16, 8, 8), 32, ((2, 1024), 32, 0)),  # narrow axes are merged, whatever they are
        ((3, 5), 32, ((2, 32), 32, 0)),  # nothing divides: padded
    ],
)
def test_groups_follow_the_shape(shape: tuple[int, ...], group: int, expected: tuple[tuple[int, ...], int, int]):
    groups = Groups.of(shape, group, 2)
    assert groups is not None
    assert (groups.shape, groups.group, groups.axis) == expected


@pytest.mark.codegen
@pytest.mark.parametrize("name", QUANTIZERS)
def test_inductor_fuses_both_ways_without_a_full_size_intermediate(name: str):
    """Forward: of all that is as large as x, only x and silu(x), which are returned, are allocated. Backward: the result.
    torch 2.11 writes x by its scale, too."""
    tokens, width = 64, 1376
    codec, groups = QUANTIZERS[name], groups_of(name, (tokens, width))

    def forward(h: torch.Tensor, w: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = h @ w
        return x, torch.nn.functional.silu(x), *codec.encode(x, groups, rounding_noise(key, [groups.rows, groups.columns]))

    def backward(dy: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = codec.decode(codes, scale, groups, (tokens, width), torch.float32)
        sigmoid = torch.sigmoid(x)
        return dy * sigmoid * (1 + x * (1 - sigmoid))

    key = round_keys(step_seed(0, 0))
    arguments = (torch.randn(tokens, 96), torch.randn(96, width), key)
    (x, y, codes, scale), (code,) = run_and_get_code(torch.compile(forward), *arguments)
    assert _wide_buffers(code, tokens * width) == (3 if TORCH_2_11 else 2)
    assert torch.equal(scale, codec.encode(x, groups, None)[1])
    assert ((codec.decode(codes, scale, groups, x.shape, x.dtype) - x).abs() <= step_of(name, x) * 1.01).all()
    got, (code,) = run_and_get_code(torch.compile(backward), y, codes, scale)
    assert _wide_buffers(code, tokens * width) == 1
    torch.testing.assert_close(got, backward(y, codes, scale))


def _wide_buffers(code: str, elements: int) -> int:
    """Allocations of ``elements`` that are not of codes."""
    found = re.findall(r"= empty_strided_\w+\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", code)
    large = [dtype for size, dtype in found if math.prod(int(n) for n in size.split(",") if n.strip()) >= elements]
    return sum(getattr(torch, dtype) not in PAYLOAD_DTYPES for dtype in large)

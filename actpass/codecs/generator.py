"""Counter-based random bits in plain integer tensor ops.

The n-th number of a stream is a function of (key, stream, n) and of nothing else. Every operation is an integer add, xor,
shift or multiply on int64 tensors that hold 32-bit values; multipliers are below 2^31, so that no product leaves int64
and there is no overflow for a compiler to reinterpret. Eager, Inductor's C++ and Triton, CPU and CUDA, any process and
any rank give the same bits.

The mixer is this project's own: five rounds of multiply, keep the middle 32 bits, xor a round key. The usual
``x ^ (x >> k)`` is avoided because Inductor inlines an expression once per use: every such fold doubles the code it
generates (two rounds of MurmurHash3's finaliser took a minute to compile), while here each value is used once and the
whole generator fuses into whatever reads it. Four rounds are not enough (consecutive differences show), five are; see
``tests/test_generator.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import torch

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0x73BFB65F, 0x75083DBB, 0x551650D7, 0x56251B4D, 0x7B1DCDAF)  # odd, below 2^31
_SHIFTS = (14, 17, 14, 17, 15)
_ROUNDING, _KEYS = 1 << 40, 1 << 41
"""The sequences of `rounding_noise` and of `rounding_keys`, beyond those of the bases."""
ROUNDING_BITS = 28
"""Eight of so many bits add up to an int32."""
_MIXED = 0x6595
"""Odd and below 2^15: times a number of 16 bits it neither loses one nor overflows an int32."""
_ONE = 0x3F800000
"""The bits of 1.0 in float32. With others behind its exponent it is a number in [1, 2)."""
_KEY_SHIFTS = (0, 31, 16, 8, 24)  # which 32 of the seed's 63 bits each round sees


def step_seed(base_seed: int, draw: int) -> int:
    """The 63-bit seed of the ``draw``-th basis under ``base_seed``: splitmix64 (Steele, Lea, Flood, 2014) on the host."""
    z = (base_seed * 0x9E3779B97F4A7C15 + draw * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) >> 1


def round_keys(seed: int, device: torch.device | None = None) -> torch.Tensor:
    """The key that all functions below take: int64 (5,), what each round of the mixer sees of a 63-bit seed. A fresh tensor,
    filled on the device: no copy from the host, no synchronisation."""
    device = torch.device("cpu") if device is None else device
    return (torch.full((len(_KEY_SHIFTS),), seed, dtype=torch.int64, device=device) >> _key_shifts(device)) & _MASK32


def region_keys(seed: int, rounding_seed: int, device: torch.device) -> torch.Tensor:
    """What a region is given: the `round_keys` of the seed of its bases and, in the upper halves of the same numbers, those of
    its rounding: a basis stays for several calls, and no two calls are rounded alike. int64 (5,), no more bytes than what a
    basis reads, or upstream's partitioner would save that in its place."""
    seeds = torch.where(_is_of_rounding(device), rounding_seed, seed)
    bases, rounding = ((seeds >> _key_shifts(device)) & _MASK32).unbind()
    return bases | (rounding << 32)


def rounding_part(keys: torch.Tensor) -> torch.Tensor:
    """Of `region_keys`, the key of `rounding_keys` and `rounding_noise`. All others read the lower halves."""
    return (keys >> 32) & _MASK32


@cache
def _key_shifts(device: torch.device) -> torch.Tensor:
    return torch.tensor(_KEY_SHIFTS, device=device)


@cache
def _is_of_rounding(device: torch.device) -> torch.Tensor:
    return torch.tensor([[False], [True]], device=device)


def stream(width: int, code: int) -> int:
    """The sequence for a basis of ``width``. code: in [0, 64), different for each use."""
    return width * 64 + code


def bits32(key: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """``count`` uniform 32-bit numbers, int64 of shape (count,); count <= 2^32.

    key: `round_keys` of the step's seed, or `region_keys`, whose lower halves are read; they are not cut off by themselves, or
    the partitioner would take its choices between them and the key. stream: which of the key's independent sequences, any
    int >= 0.
    """
    x = torch.arange(count, dtype=torch.int64, device=key.device) ^ (step_seed(stream, 0) & _MASK32)
    for i, (multiplier, shift) in enumerate(zip(_MULTIPLIERS, _SHIFTS, strict=True)):
        if i == 2:
            x = x ^ (step_seed(stream, 1) & _MASK32)
        x = (((x ^ key[i]) & _MASK32) * multiplier) >> shift
    return x & _MASK32


def signs(key: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """``count`` fair signs, float32 -1 or +1."""
    return ((bits32(key, stream, count) >> 31) * 2 - 1).to(torch.float32)


def normals(key: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """``count`` numbers close to N(0, 1), float32, bit-identical everywhere.

    Irwin-Hall: the sum of twelve 16-bit uniforms (two from each of six hashes), centred and scaled to variance 1. All sums
    are exact integers; Box-Muller is not used because log and cos differ in the last bit between back ends. Excess
    kurtosis -0.1, range +-6.
    """
    h = bits32(key, stream, 6 * count).view(6, count)
    total = ((h & 0xFFFF) + (h >> 16)).sum(0)
    mean = 12 * 0xFFFF // 2
    std = (2.0**32 - 1.0) ** 0.5  # twelve 16-bit uniforms, each of variance (2^32 - 1) / 12
    return (total - mean).to(torch.float32) * (1.0 / std)


def permutation(key: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """A random permutation of range(count), int64: the order of random keys, made unique by the index (count < 2^21)."""
    index = torch.arange(count, dtype=torch.int64, device=key.device)
    return torch.sort((bits32(key, stream, count) << 21) | index).values & ((1 << 21) - 1)


def rounding_keys(key: torch.Tensor, count: int, draw: int = 0) -> torch.Tensor:
    """``count`` independent keys, one for each tensor that is rounded in a step: int64 (count, 8). Rows of 64 bytes, so that
    each is aligned as a tensor of its own; the functions here read the first five numbers. draw: which of the key's independent
    draws, any int in [0, 2^32)."""
    return bits32(key, _KEYS + draw, 8 * count).view(count, 8)


def rounding_noise(key: torch.Tensor, lengths: Sequence[int], draw: int = 0) -> tuple[torch.Tensor, ...]:
    """Random numbers for rounding, int32, whose last `ROUNDING_BITS` bits are uniform: a tensor of each of ``lengths``.

    draw: which of the key's independent draws, any int in [0, 2^40). See `uniforms`.

    Each number is a sum of eight hashes: a sum over eight, because Inductor writes it to memory and then reads it, where it
    would compute a hash again at every element. Each tensor begins at a multiple of 64 bytes, if the lengths before it are
    known.
    """
    starts = [0, *itertools.accumulate(-(-length // 16) * 16 for length in lengths)]
    hashes = (bits32(key, _ROUNDING + draw, 8 * starts[-1]) >> (32 - ROUNDING_BITS)).to(torch.int32)
    noise = hashes.view(8, starts[-1]).sum(0, dtype=torch.int32)
    return tuple(noise[start : start + length] for start, length in zip(starts, lengths, strict=False))


def uniforms(noise: Sequence[torch.Tensor], shape: Sequence[int], bits: int, piece: int, width: int) -> torch.Tensor:
    """Uniform numbers in (0, 1) of ``bits`` bits, and half of the last one, float32 of ``shape`` (..., groups, group).

    noise: `rounding_noise` of the rows and of the columns, groups times group. piece: which ``width`` bits of their numbers are
    taken, width <= 16, and of those the first ``bits``.

    The exclusive or of a number of the row and one of the column, times a constant: every number is uniform, and any two are
    independent, also those of two tensors that share the rows', which is what an unbiased sum of known variance needs. All of
    one column, which a weight's gradient sums, are independent, and so are all of one row. Without the product two columns
    would differ by one and the same pattern in all rows: their errors, though uncorrelated over many draws, would be equal or
    opposite in each of them, and sums over columns would have rare, large errors.
    """
    *rows, groups, group = shape
    row = noise[0].view(*rows, 1, 1)
    column = noise[1].view(*(1 for _ in rows), groups, group)
    part = ((row ^ column) >> (piece * width)) & (2**width - 1)
    first = (part * _MIXED) & (2**width - 2 ** (width - bits))
    return ((first << (23 - width)) | _ONE).view(torch.float32) - (1.0 - 2.0 ** -(bits + 1))

"""Arithmetic in the precision that it is written in, whatever the caller asks of matmuls."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

_backends: Any = torch.backends
_MATMULS: tuple[Any, ...] = (_backends.cuda.matmul, _backends.mkldnn.matmul)


@contextmanager
def as_written(device: torch.device) -> Generator[None, None, None]:
    """Neither autocast on ``device`` nor TF32 or bfloat16 inside a float32 matmul: the Gram matrix that such numbers make has
    no Cholesky factor, and what is stored in one precision is not found again in another."""
    rounding = [(m, m.fp32_precision) for m in _MATMULS if m.fp32_precision not in ("ieee", "none")]
    available = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if available else nullcontext():
        try:
            for matmul, _ in rounding:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            for matmul, before in rounding:
                matmul.fp32_precision = before

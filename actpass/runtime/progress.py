"""Lines about the first step, which compiles for minutes: the logger ``actpass`` at level INFO."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

log = logging.getLogger("actpass")
_numbers = itertools.count(1)
_now = (0, 0.0)
"""The region that is being compiled, and since when."""


def clear() -> None:
    """Count regions from 1 again."""
    global _numbers, _now
    _numbers, _now = itertools.count(1), (0, 0.0)


def show_progress() -> None:
    """Say on standard error what is planned and compiled, and how long it took: the first step takes minutes, in which nothing
    else is seen. It sets the level of the logger ``actpass`` to INFO, and gives it a handler if there is none yet."""
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


@contextmanager
def compiling() -> Generator[None, None, None]:
    """Around all that is done for one region."""
    global _now
    _now = number, start = next(_numbers), time.perf_counter()
    log.info("region %d: planning", number)
    yield
    log.info("region %d: compiled, %.1f s in all", number, time.perf_counter() - start)


def planned() -> None:
    """The region's plan is made, and Inductor has its turn."""
    number, start = _now
    log.info("region %d: planned in %.1f s; Inductor compiles it", number, time.perf_counter() - start)

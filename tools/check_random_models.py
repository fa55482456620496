"""Must show: random models keep what every model must, under random forms (see tests/random_models.py).

    python tools/check_random_models.py --examples 2000 --seed 0 [--forms 2]

Example ``i`` is drawn with the seed ``seed + i``: ``--seed N --examples 1`` runs the one that failed as N again, and
``--shrink`` leaves out operators of it for as long as it fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import actpass
from tests.random_models import FORMS, Spec, check, random_spec


def drawn(seed: int, count: int) -> tuple[Spec, list[dict[str, Any]]]:
    """The model of a seed, and ``count`` forms."""
    generator = random.Random(seed)
    return random_spec(generator.choice), generator.sample(FORMS, count)


def failure(spec: Spec, forms: Sequence[dict[str, Any]]) -> str | None:
    """What does not hold of the model of ``spec``; whatever is raised is a finding."""
    torch.compiler.reset()
    actpass.runtime.regions.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", actpass.ActpassWarning)
            check(spec, forms)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def without(spec: Spec, i: int) -> Spec | None:
    """``spec`` without its operator ``i``: what read it reads what it read. None where widths do not fit."""
    dropped = spec[i]
    if i == 0 or (spec[dropped.of[0] - 1].width if dropped.of[0] else 4) != dropped.width:
        return None

    def moved(k: int) -> int:
        return dropped.of[0] if k == i + 1 else k - (k > i + 1)

    return tuple(replace(o, of=tuple(map(moved, o.of))) for j, o in enumerate(spec) if j != i)


def shrunk(spec: Spec, forms: Sequence[dict[str, Any]]) -> Spec:
    """With no operator that is not needed for the failure."""
    for i in reversed(range(len(spec))):
        smaller = without(spec, i)
        if smaller is not None and failure(smaller, forms) is not None:
            return shrunk(smaller, forms)
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", type=int, default=2, help="of each model, beside the exact one")
    parser.add_argument("--shrink", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, failed = time.monotonic(), list[int]()
    for done, seed in enumerate(range(arguments.seed, arguments.seed + arguments.examples), 1):
        spec, forms = drawn(seed, arguments.forms)
        reason = failure(spec, forms)
        if reason is not None:
            failed.append(seed)
            print(f"seed {seed} FAILED: {reason}\n  {spec}\n  {forms}", flush=True)
            if arguments.shrink:
                print(f"  smallest: {shrunk(spec, forms)}", flush=True)
        if done % 20 == 0 or done == arguments.examples:
            print(f"{done} of {arguments.examples} in {time.monotonic() - start:.0f} s, failed: {failed or 'none'}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

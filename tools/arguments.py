"""Command-line arguments that the tools share, and actpass's options in the form of arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any

from workloads import UsageError

from actpass.options import options_for


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable. Allowed: an int >= 1.")
    return value


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable. Allowed: a number in [0, 1].")
    return value


def rank(text: str) -> int | float:
    """``64`` (directions) or ``0.25`` (a fraction of the width)."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is no rank. Allowed: an int (directions), or a float in (0, 1], e.g. 0.25.")


def memory_budget(text: str) -> float | str:
    """A fraction, or text such as ``20GiB`` that actpass reads itself."""
    try:
        return float(text)
    except ValueError:
        return text


def override(text: str) -> tuple[str, str | dict[str, Any]]:
    """``PATTERN=NAME[:RANK]``, of a codec, a projection or a policy: ``lm_head=save``, ``layers.*.mlp=haar:0.25``."""
    pattern, equals, form = text.partition("=")
    name, colon, r = form.partition(":")
    if not (pattern and equals and name and bool(colon) == bool(r)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=NAME[:RANK], e.g. lm_head=save, *.mlp=haar:0.25.")
    return pattern, {**options_for(name), "rank": rank(r)} if r else name


def option(text: str) -> tuple[str, Any]:
    """``key=value``; the value is read as JSON if it is JSON (``64``, ``false``), else as text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. refresh_interval=50, skip_unprofitable=false.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("actpass options", "as in torch.compile(..., options={...})")
    group.add_argument("--policy", help="auto or exact")
    group.add_argument("--codec", help="int8, int4, ...; unknown ones are listed by the error")
    group.add_argument("--projection", help="gaussian, haar, ...; unknown ones are listed by the error")
    group.add_argument("--rank", type=rank, help="an int (directions) or a float (fraction of the width)")
    group.add_argument("--memory-budget", type=memory_budget, help="fraction of what Inductor's default saves")
    group.add_argument("--override", type=override, action="append", default=[], metavar="PATTERN=NAME[:RANK]")
    group.add_argument("--option", type=option, action="append", default=[], metavar="KEY=VALUE", help="any other option")
    group.add_argument(
        "--plan", metavar="FILE", help="follow the plan in this file, in place of a policy and a budget's search"
    )
    group.add_argument("--off", action="store_true", help="compression off: what Inductor itself saves")


def options_from(given: argparse.Namespace) -> dict[str, Any]:
    """actpass's options as given; actpass checks them."""
    options: dict[str, Any] = {
        name: value
        for name in ("policy", "codec", "projection", "rank", "memory_budget", "plan")
        if (value := getattr(given, name)) is not None
    }
    if given.override:
        options["module_overrides"] = dict(given.override)
    options.update(given.option)
    if not given.off:
        return options
    if options:
        raise UsageError(f"--off leaves nothing to choose: it can't be combined with {', '.join(options)}.")
    return {"policy": "exact", "memory_budget": 1.0}

"""What is done to Dynamo's graph before it is given to AOTAutograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from actpass.backend.attention_masks import infer_masks
from actpass.ir.inline import inline_regions
from actpass.options import Config


def prepared(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, *, guarded: bool = True
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Dynamo's ``gm`` with marked regions in line and without masks that attention can do without, and notes on both.
    guarded: see `infer_masks`."""
    gm, calls = inline_regions(gm, example_inputs)
    notes = (_on_calls(calls),) if calls else ()
    if not config.infers_masks:
        return gm, notes
    gm, on_masks = infer_masks(gm, example_inputs, guarded=guarded)
    return gm, (*notes, *on_masks)


def _on_calls(calls: int) -> str:
    called = "a call" if calls == 1 else f"{calls} calls"
    why = "Inductor overwrites what a region that is called still needs for its backward, and one budget is over all of them"
    return f"{called} of nested_compile_region in line, each compiled by itself: {why}"

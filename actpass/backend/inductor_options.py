"""Inductor's options for what a configuration compiles."""

from __future__ import annotations

from typing import Any

from actpass.options import Config
from actpass.torch_compat import FUSION_GATE, fusion_gate, fusion_gate_limit, inductor_config, list_mode_options

_LEAST_SHARED_BYTES = 2**16
"""Under a budget, and where tensors are decoded from projections, loops that share fewer bytes than this are not fused.
Inductor's 10 let a rope's 32 frequencies fuse loops of two layers; where both are run again, that keeps a layer's tensors alive
through the next one's backward (0.06 of llama-mini's peak) to save a read of 128 bytes. And the step's seed let it draw the
random numbers of all layers' bases in one loop (half of llama-60m's peak with `prac`)."""


_PEAK_GROWTH = 0.02
"""Of a graph's peak before any fusion: what fusions may add (torch 2.15; before, nothing asks). With 0 called graphs
lose fusions that cost a few scales. What is refused reads its inputs once more; on a CPU one refusal also keeps a row's
reduction and the loop behind it apart, in the whole graph (`actpass.memory.fusion`)."""


def options_within(
    memory_budget: float | int | str | None, config: Config, growth: float | None = _PEAK_GROWTH
) -> dict[str, Any]:
    """Inductor's options for what ``config`` compiles within a budget, or decodes from projections, or plans at all."""
    if memory_budget == 1.0 and not config.projects_activations:
        return {}
    few = memory_budget is not None or config.projects_activations
    return _options_of(_LEAST_SHARED_BYTES if few else None, growth, config)


def _options_of(least_shared_bytes: int | None, growth: float | None, config: Config) -> dict[str, Any]:
    """Where few loops are fused, memory is given back behind its last reader, too: Inductor keeps it for a later result of the
    same size up to what it takes for the peak, which is the end of the backward where an embedding's gradient is large
    (RoBERTa-large: a quarter of the peak). So it is beside a gate, ours or the user's, which is for the peak, too: with what is
    held predictions were 5 % off, without it they are exact (2.15). Not where nothing is coded: peaks are the same there, and
    on a CPU each new tensor costs page faults (4 % of a step of llama-60m). growth: see `_PEAK_GROWTH`."""
    gate = fusion_gate(growth)
    within = least_shared_bytes is not None and least_shared_bytes >= _LEAST_SHARED_BYTES
    is_gated = bool(gate) or fusion_gate_limit() is not None
    kept = {"allow_buffer_reuse": False} if within or (is_gated and not config.stores_exactly) else {}
    shared = {} if least_shared_bytes is None else {"score_fusion_memory_threshold": least_shared_bytes}
    return {**shared, **kept, **gate}


def inductor_options(config: Config) -> dict[str, Any]:
    asked = dict(config.inductor_options)
    gate = {name: asked[name] for name in FUSION_GATE if name in asked and hasattr(inductor_config, name)}
    with inductor_config.patch(gate):
        own = options_within(config.memory_budget, config, None if gate else _PEAK_GROWTH)
        if config.plan is not None:
            regions = config.plan.regions
            growth = next((r.peak_growth for r in regions if r.peak_growth is not None), None)
            own = _options_of(max(r.least_shared_bytes for r in regions), None if gate else growth, config)
    return {**own, **(list_mode_options(config.mode) if config.mode else {}), **asked}


def has_cuda_graphs(config: Config) -> bool:
    return bool(inductor_options(config).get("triton.cudagraphs", inductor_config.triton.cudagraphs))

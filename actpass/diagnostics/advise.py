"""What a step's memory goes to, and what other settings would make of it: planned anew for the same graph where the pass
decides it, in closed form where it does not."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.ir.copying import copy_module
from actpass.ir.joint_graph import storage_root
from actpass.ir.outputs import output_values
from actpass.memory import optimizer_state as optimizers
from actpass.memory.footprint import levels_below
from actpass.memory.memory_curve import Held
from actpass.memory.resident import Resident, resident, storage_bytes
from actpass.options import Config
from actpass.pipeline import Compiled
from actpass.reporting.advice import LEAST_SHARE, Advice, Part, Setting
from actpass.torch_compat import checkpoint_function

Trials = Mapping[str, Sequence[Compiled]]
"""By the words for a setting, what the pass made of all regions with it."""
ADAPTER_RANK = 16
"""Of the adapters that are advised."""
_NF4_BYTES = 0.5 + 4 / 64
"""An element: four bits, and a float32 for each block of 64."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Bytes of a call of a region at the peak of one of its passes, by what they are for."""

    saved: int
    gradients: int
    returned: int


@dataclass(frozen=True, slots=True)
class _Peak:
    """nbytes: above what is resident. during: what runs then."""

    nbytes: int
    during: str
    parts: Mapping[str, int]
    largest: Held | None


def other_storage(config: Config) -> tuple[str, dict[str, Any]] | None:
    """What of the options to change next so that less is stored, in words and as options; None where they name a format, a
    plan or a budget."""
    chosen = config.tensor_options
    if config.plan is not None or config.memory_budget is not None or config.module_overrides:
        return None
    if chosen.described == "policy='exact'":
        return "policy='auto'", {"policy": "auto"}
    return ("codec='int4'", {"codec": "int4"}) if chosen.described == "policy='auto'" else None


def losses_alone(gm: fx.GraphModule, compiled: Compiled) -> fx.GraphModule | None:
    """A clone of Dynamo's graph that returns of its differentiable results the scalars alone; None if there is no such scalar,
    or nothing else that weighs. compiled: what became of the graph."""
    footprint = compiled.record.footprint
    if footprint is None or footprint.returned < LEAST_SHARE * max(footprint.forward, footprint.backward):
        return None
    results: Any = gm.graph.output_node().args[0]
    made = [r.meta.get("example_value") if isinstance(r, fx.Node) else None for r in results]
    wanted = [isinstance(v, torch.Tensor) and v.requires_grad for v in made]
    scalar = [isinstance(v, torch.Tensor) and v.requires_grad and v.dim() == 0 for v in made]
    if not any(scalar) or scalar == wanted:
        return None
    clone, mapping = copy_module(gm)
    kept = tuple(mapping[r] for r, s in zip(results, scalar, strict=True) if s)
    clone.graph.output_node().args = (kept,)
    clone.recompile()
    return clone


def can_checkpoint(model: torch.nn.Module) -> bool:
    """Whether its layers can be checkpointed as those of ``transformers`` are, and none is."""
    found = [getattr(m, _FLAG) for m in _checkpointable(model)]
    return model.training and bool(found) and not any(found)


@contextmanager
def checkpointing(model: torch.nn.Module) -> Generator[None, None, None]:
    """Inside, layers of ``transformers`` are checkpointed, as ``model.gradient_checkpointing_enable()`` has it."""
    before = [
        (m, {name: m.__dict__[name] for name in (_FLAG, _FUNCTION) if name in m.__dict__}) for m in _checkpointable(model)
    ]
    try:
        for module, _ in before:
            setattr(module, _FLAG, True)
            setattr(module, _FUNCTION, checkpoint_function())
        yield
    finally:
        for module, given in before:
            for name in (_FLAG, _FUNCTION):
                module.__dict__.pop(name, None)
            module.__dict__.update(given)


_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
"""By which a module of transformers 4.35 to 5.24 is told to run its layers, or itself, within checkpoints."""


def _checkpointable(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, _FLAG, None), bool)]


def advise(
    model: torch.nn.Module, inputs: Iterable[torch.Tensor], config: Config, found: Sequence[Compiled], trials: Trials
) -> Advice | None:
    """inputs: of the call that ``found`` was made of. None if nothing was compiled, or its memory is not predicted."""
    there = resident([*model.parameters(), *model.buffers(), *inputs], (), config.optimizer_state_bytes)
    now = _peak(found, there)
    if now is None:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters, own = storage_bytes(model.parameters()), storage_bytes(trained)
    assumed = " (AdamW's, assumed)" if there.assumed else ""
    parts = {
        "trained parameters": own,
        "frozen parameters": parameters - own,
        "buffers and inputs": there.inputs - parameters,
        f"optimizer state{assumed}": there.optimizer_state,
        "accumulated gradients": there.accumulated,
        **now.parts,
    }
    step_bytes = there.total + now.nbytes
    peaks = {what: _peak(regions, there) for what, regions in trials.items()}
    settings = [Setting(what, there.total + peak.nbytes, planned=True) for what, peak in peaks.items() if peak is not None]
    settings += [Setting(what, step_bytes - less, planned=False) for what, less in _in_closed_form(model, there)]
    return Advice(
        step_bytes,
        now.during,
        tuple(sorted((Part(what, n) for what, n in parts.items() if n > 0), key=lambda p: -p.nbytes)),
        now.largest,
        tuple(sorted(settings, key=lambda s: s.step_bytes)),
    )


def _peak(regions: Sequence[Compiled], there: Resident) -> _Peak | None:
    """Of a step that runs ``regions`` in order, above what is ``there``."""
    footprints = [f for f in (r.record.footprint for r in regions) if f is not None]
    if not footprints or len(footprints) < len(regions):
        return None
    forwards, backwards = levels_below(footprints)
    levels = [(below + f.forward, i, False) for i, (f, below) in enumerate(zip(footprints, forwards, strict=True))]
    levels += [(below + f.backward, i, True) for i, (f, below) in enumerate(zip(footprints, backwards, strict=True))]
    nbytes, at, backward = max(levels)
    gradients = sum(f.gradients for f in footprints)
    if gradients + there.scratch > nbytes:
        parts = {"gradients": gradients, "what the optimizer's step takes for a moment": there.scratch}
        return _Peak(gradients + there.scratch, "the optimizer's step", parts, None)
    own = _parts(regions[at], backward)
    later = footprints[at + 1 :] if backward else ()
    left = sum(f.gradients for f in later)
    saved, returned = (sum(getattr(f, name) for f in footprints[:at]) for name in ("kept", "returned"))
    told = {
        "saved for the backward": own.saved + saved,
        "gradients": own.gradients + left,
        "returned to the caller": own.returned + returned,
    }
    told["working memory"] = nbytes - sum(told.values())  # less than none where a result is written over what it is made of
    curves = regions[at].record.curves
    held = () if curves is None else curves.at_backward_peak if backward else curves.at_forward_peak
    return _Peak(nbytes, "the backward" if backward else "the forward", told, held[0] if held else None)


def _parts(region: Compiled, backward: bool) -> _Parts:
    cut, joint = region.cut, region.traced.joint if region.decided is None else region.decided.region.joint
    early = {s["base"] for s in region.record.plan["storages"] if s["reason"] == EARLY_GRADIENT}
    timeline = cut.timelines[backward]
    outputs = output_values(cut.forward.graph)[: joint.num_fwd_outputs]
    returned = {storage_root(o).name for o in outputs if isinstance(o, fx.Node)}
    base = {name: s.base for s in cut.saved for name in (s.name, s.base, s.holder)}
    made: set[str] = set()
    if backward:
        pairs = zip(joint.primals, output_values(cut.backward.graph), strict=False)
        made = {storage_root(o).name for p, o in pairs if p in joint.parameter_path and isinstance(o, fx.Node)}
    sums = {"saved": 0, "gradients": 0, "returned": cut.returned_bytes if backward else 0}
    for name, nbytes in timeline.live:
        crosses = base.get(cut.arrives.get(name, name) if backward else name)
        if name in made or crosses in early:
            sums["gradients"] += nbytes
        elif not backward and name in returned:
            sums["returned"] += nbytes
        elif crosses is not None:
            sums["saved"] += nbytes
    return _Parts(**sums)


def _in_closed_form(model: torch.nn.Module, there: Resident) -> list[tuple[str, int]]:
    """(words, bytes less) of settings that the pass has no part in."""
    found: list[tuple[str, int]] = []
    trained = [p for p in model.parameters() if p.requires_grad]
    known = optimizers.stepping(trained)
    if there.optimizer_state and (there.assumed or (known and all(map(optimizers.is_adam, known)))):
        stepped = {id(p): p for p in [*trained, *(p for o in known for p in optimizers.stepped_by(o))]}
        less = there.optimizer_state - optimizers.state_in_8_bits(stepped.values())
        found.append(("AdamW's moments in 8 bits (torchao.optim.AdamW8bit)", less))
        if all(p.requires_grad for p in model.parameters()):
            found += _adapters(model, there)
    return [*found, *_quantized(model)]


def _linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """All but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def _adapters(model: torch.nn.Module, there: Resident) -> list[tuple[str, int]]:
    layers = _linear_layers(model)
    factors = sum(ADAPTER_RANK * (m.in_features + m.out_features) * m.weight.element_size() for m in layers)
    if not layers or any(min(m.in_features, m.out_features) < 2 * ADAPTER_RANK for m in layers):
        return []
    what = (
        f"adapters (LoRA of rank {ADAPTER_RANK} on all linear layers but the head), counting AdamW's state and adapters alone"
    )
    return [(what, there.optimizer_state - 3 * factors)]


def _quantized(model: torch.nn.Module) -> list[tuple[str, int]]:
    """Frozen weights of linear layers; the largest of them is there whole while it is used."""
    layers = _linear_layers(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    weights = {id(m.weight): m.weight for m in layers if type(m.weight) is torch.nn.Parameter and id(m.weight) not in trained}
    wide = [w for w in weights.values() if w.is_floating_point() and w.element_size() > 1]
    if not wide:
        return []
    nbytes = sum(w.numel() * w.element_size() for w in wide)
    less = nbytes - round(sum(w.numel() for w in wide) * _NF4_BYTES) - max(w.numel() * w.element_size() for w in wide)
    return [(f"frozen weights of linear layers, {len(wide)} of them, in 4 bits (NF4)", less)]

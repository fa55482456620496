"""Joint graphs that Dynamo and AOTAutograd traced once, for the pass to decide on as often as a test asks, and to be run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.backend.inductor_options import inductor_options
from actpass.backend.partitioner import no_code
from actpass.backend.state_inputs import RegionRequest, device_of, with_state
from actpass.codecs.generator import region_keys, step_seed
from actpass.diagnostics.interpreter import isolated_forward
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import GraphInputs
from actpass.ir.joint_graph import Joint, value
from actpass.memory.resident import storages
from actpass.options import Config, parse
from actpass.passes.base import RegionState
from actpass.pipeline import Compiled, compile_joint
from actpass.torch_compat import CustomPartitionerFn, compile_fx, dynamo, functorch_config, inductor_config

from . import models


@dataclass(frozen=True)
class Run:
    """results: of the forward. gradients: by parameter. kept: bytes of the storages that crossed, the model's own
    inputs apart."""

    results: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    kept: int


@dataclass
class JointGraph:
    """What the partitioner is given for one region, with the step's seed as its last input, and the tensors to run it on."""

    gm: fx.GraphModule
    joint_inputs: Sequence[object]
    inputs: GraphInputs
    kwargs: Mapping[str, Any]
    primals: list[Any] = field(default_factory=list)

    def compiled(self, **options: Any) -> Compiled:
        """What the pass makes of it under ``options``, which must ask for no learned subspace and no low-rank gradient."""
        config = parse(options)
        assert not config.learned
        assert not config.keeps_low_rank_gradients
        with inductor_config.patch(inductor_options(config)):
            return compile_joint(_state_of(self.gm, self.joint_inputs, self.inputs, self.kwargs, config))

    def run_joint(self) -> list[torch.Tensor]:
        """Results and gradients of the graph as it is, node by node, from a gradient of one for each result."""
        primals = [*self.primals, region_keys(0, 0, torch.device("cpu"))]
        results = [value(n) for n in Joint(self.gm, self.inputs, self.kwargs["num_fwd_outputs"]).forward_outputs]
        ones = [torch.ones(r.shape, dtype=r.dtype) for r in results]
        with torch.no_grad():
            outputs = fx.Interpreter(self.gm).run(*primals, *ones)
        return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]

    def run(self, forward: fx.GraphModule, backward: fx.GraphModule, seed: int = 0) -> Run:
        """One forward and one backward, node by node, from a gradient of one for each result."""
        primals = [*self.primals, region_keys(step_seed(0, seed), step_seed(0, seed), torch.device("cpu"))]
        with torch.no_grad():
            outputs = fx.Interpreter(forward).run(*primals)
            count = self.kwargs["num_fwd_outputs"]
            results, saved = list(outputs[:count]), outputs[count:]
            gradients = fx.Interpreter(backward).run(*saved, *(torch.ones_like(r) for r in results))
        own = {key for p in self.primals for key, _ in storages(p)}
        kept = {key: nbytes for t in saved if isinstance(t, torch.Tensor) for key, nbytes in storages(t) if key not in own}
        named = zip((path or f"input {i}" for i, path in enumerate(self.inputs.paths)), gradients, strict=False)
        return Run(results, {name: g for name, g in named if g is not None}, sum(kept.values()))


def state_of(joint: JointGraph, **options: Any) -> RegionState:
    """What the first pass is given."""
    return _state_of(joint.gm, joint.joint_inputs, joint.inputs, joint.kwargs, parse(options))


def _state_of(
    gm: fx.GraphModule, joint_inputs: Sequence[object], inputs: GraphInputs, kwargs: Mapping[str, Any], config: Config
) -> RegionState:
    static = frozenset(kwargs.get("static_lifetime_input_indices") or ())
    joint = Joint(gm, inputs, kwargs["num_fwd_outputs"], static)
    return RegionState(joint=joint, joint_inputs=joint_inputs, kwargs=kwargs, config=config)


class _Capture(CustomPartitionerFn):
    """A partitioner that keeps what it is given, and cuts as Inductor does."""

    def __init__(self, inputs: GraphInputs) -> None:
        self.inputs, self.found = inputs, list[JointGraph]()

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> tuple[fx.GraphModule, ...]:
        self.found.append(JointGraph(copy_module(gm)[0], joint_inputs, self.inputs, kwargs))
        done = compile_joint(_state_of(gm, joint_inputs, self.inputs, kwargs, Config(memory_budget=1.0)))
        return done.forward, done.backward

    def uuid(self) -> Any:
        return None


def trace(model: torch.nn.Module, inputs: Mapping[str, Any]) -> JointGraph:
    """The one joint graph of ``model(**inputs)``, with a seed."""
    found: list[JointGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        plain, device = GraphInputs.of(gm, example_inputs), device_of(example_inputs)
        request = RegionRequest(gm=gm, example_inputs=example_inputs, config=Config(), inputs=plain, device=device)
        seeded = with_state(request)
        partitioner = _Capture(seeded.inputs)
        patches: dict[str, Any] = {"custom_partitioner_fn": partitioner}
        with functorch_config.patch(enable_autograd_cache=False):
            compile_fx(seeded.gm, seeded.example_inputs, config_patches=patches, inner_compile=no_code)
        (joint,) = partitioner.found
        joint.primals = list(example_inputs)
        found.append(joint)
        return gm.forward

    with torch.enable_grad():
        dynamo.optimize(backend)(isolated_forward(model))(**inputs)
    (joint,) = found
    return joint


@functools.cache
def traced(name: str) -> JointGraph:
    """The joint graph of the function ``name`` of tests/models.py, traced once in a session."""
    return trace(*getattr(models, name)())


def stock(joint: JointGraph) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The joint graph as Inductor cuts it by itself."""
    default = joint.compiled(policy="exact", memory_budget=1.0).traced.default
    assert default is not None
    return default.forward, default.backward

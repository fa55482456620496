"""What an error in each saved tensor does to the gradients: measured on a small batch, one tensor at a time.

The forward runs once. The backward runs once for each tensor that could be stored in few bits, with that tensor rounded and
all else exact, and its gradients are compared with the exact ones in the direction in which an optimizer with Adam's
preconditioner would step: an error in coordinates that are always small counts as much as one in large ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actpass.backend.dynamo_graph import prepared
from actpass.backend.partitioner import run_passes
from actpass.backend.state_inputs import RegionRequest
from actpass.codecs import QUANTIZERS
from actpass.codecs.generator import region_keys
from actpass.diagnostics.interpreter import interpret, isolated_forward, own_errors, own_gradients, preserve_buffers_and_rng
from actpass.errors import OptionError
from actpass.ir.joint_graph import Joint, module_path, plain_input_index
from actpass.options import Config, exactly
from actpass.passes.quantize_saved import layout_of
from actpass.pipeline import Compiled
from actpass.plan import RECOMPUTED_SCORE, SCORE, CodecSet
from actpass.plan.sensitivity import Sensitivities, Sensitivity
from actpass.torch_compat import compile_fx, dynamo, functorch_config

_SAMPLE = 2**16
"""Coordinates of each gradient that are compared: memory of one set of gradients is enough."""


def calibrate_model(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: Config,
    optimizer: torch.optim.Optimizer | None,
    loss: Callable[[Any], torch.Tensor],
) -> Sensitivities:
    """See `actpass.calibrate`."""
    config = replace(exactly(config), inductor_options=(*config.inductor_options, ("fallback_random", True)))
    state: Mapping[Any, Mapping[str, Any]] = optimizer.state if optimizer is not None else {}
    regions: list[_Region] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        gm = prepared(gm, example_inputs, config)[0]
        region = _Region(example_inputs, state)
        request = RegionRequest.of(gm, example_inputs, config)
        with functorch_config.patch(enable_autograd_cache=False):
            compiled, fn = run_passes(request, compile_fx, inner_compile=region.inner_compile)
        region.compiled = compiled
        regions.append(region)

        def seeded(*args: Any) -> Any:
            return fn(*args, region_keys(0, 0, request.device))

        return seeded if config.needs_seed else fn

    model = getattr(model, "_orig_mod", model)
    with torch.enable_grad(), preserve_buffers_and_rng(model), own_gradients(model), own_errors():
        value: Any = loss(dynamo.optimize(backend)(isolated_forward(model))(*inputs, **kwargs))
        value.backward()
    rows = tuple(row for region in regions for row in region.rows())
    if not rows:
        raise OptionError("nothing of this model is saved in a form that could be coarser: there is nothing to calibrate.")
    return Sensitivities(rows, "Adam" if state else "Adafactor, from the gradient of the batch")


@dataclass
class _Region:
    """One region while it is measured. inputs: what it was compiled for. state: of the optimizer, by parameter."""

    inputs: Sequence[Any]
    state: Mapping[Any, Mapping[str, Any]]
    compiled: Compiled | None = None
    found: dict[tuple[str, str], list[tuple[dict[str, float], float]]] = field(default_factory=lambda: defaultdict(list))

    def inner_compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **_: Any) -> Any:
        if not is_backward:
            return interpret(gm, example_inputs)

        def run(args: list[Any]) -> Any:
            self._measure(gm, args)
            return fx.Interpreter(gm).boxed_run(args)

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return run

    def rows(self) -> list[Sensitivity]:
        """The mean over the calls."""
        rows: list[Sensitivity] = []
        for (module, node), measured in self.found.items():
            errors = {form: sum(e[form] for e, _ in measured) / len(measured) for form in measured[0][0]}
            rows.append(Sensitivity(module, node, tuple(errors.items()), sum(factor for _, factor in measured) / len(measured)))
        return rows

    def _measure(self, gm: fx.GraphModule, args: Sequence[Any]) -> None:
        assert self.compiled is not None
        if self.compiled.decided is None:
            return
        region, cut = self.compiled.decided.region, self.compiled.cut
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        made, codecs = {n.name: n for n in cut.forward.graph.nodes}, CodecSet.of(QUANTIZERS)
        exact = _Gradients.of(_run(gm, args), region.joint, self.inputs, self.state)
        for t in region.saved(region.joint, cut):
            at = [names.index(name) for name in t.saved_for_backward if name in names]
            if t.obstacle is not None or not at:
                continue
            form = codecs.coarsest_safe_for(SCORE if SCORE in t.kinds else RECOMPUTED_SCORE)
            errors = {f: _rounded(args, at, f)[1] for f in codecs.offered if f != form}
            changed, errors[form] = _rounded(args, at, form)
            if errors[form] > 0:
                factor = exact.error(_run(gm, changed)) / errors[form]
                self.found[module_path(made[t.node]), t.node].append((errors, factor))


def _run(gm: fx.GraphModule, args: Sequence[Any]) -> Sequence[Any]:
    return fx.Interpreter(gm).run(*args)


def _rounded(args: Sequence[Any], at: Sequence[int], form: str) -> tuple[list[Any], float]:
    """``args`` with the memory that those at ``at`` show rounded to ``form``, and its squared relative error."""
    changed = list(args)
    whole = max((args[i] for i in at), key=lambda x: x.numel())
    storage = torch.empty(0, dtype=whole.dtype, device=whole.device).set_(whole.untyped_storage().clone())
    for i in at:
        changed[i] = storage.as_strided(args[i].shape, args[i].stride(), args[i].storage_offset())
    target = storage.as_strided(whole.shape, whole.stride(), whole.storage_offset())
    layout = layout_of(whole, form, None)
    assert layout is not None  # sizes are numbers here
    flat = whole.permute(layout.order)
    flat = flat.reshape(-1 if layout.groups.padding else layout.groups.shape)
    codec = QUANTIZERS[form]
    back = codec.decode(*codec.encode(flat, layout.groups, None), layout.groups, layout.shape, whole.dtype)
    target.permute(layout.order).copy_(back)
    energy = float(whole.double().square().sum())
    return changed, float((target.double() - whole.double()).square().sum()) / energy if energy else 0.0


@dataclass(frozen=True)
class _Sample:
    """Coordinates of one gradient. position: among the backward's outputs. at: flat indices, None: all. values: there. scale:
    what Adam would divide them by. stands_for: how many each stands for."""

    position: int
    at: torch.Tensor | None
    values: torch.Tensor
    scale: torch.Tensor
    stands_for: float

    def seen(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.detach().reshape(-1)
        return (flat if self.at is None else flat[self.at]).double()


@dataclass(frozen=True)
class _Gradients:
    """The exact gradients, sampled."""

    samples: tuple[_Sample, ...]

    @classmethod
    def of(
        cls, outputs: Sequence[Any], joint: Joint, inputs: Sequence[Any], state: Mapping[Any, Mapping[str, Any]]
    ) -> _Gradients:
        kept: list[_Sample] = []
        for position, (primal, gradient) in enumerate(zip(joint.primals, outputs, strict=False)):
            if not isinstance(gradient, torch.Tensor) or not gradient.is_floating_point():
                continue
            index = plain_input_index(primal.meta.get("desc"))
            parameter = inputs[index] if index is not None and index < len(inputs) else None
            own: Mapping[str, Any] = state.get(parameter, {}) if isinstance(parameter, torch.nn.Parameter) else {}
            second = None if "basis_draw" in own else own.get("exp_avg_sq")  # of a low-rank gradient: of its coefficients
            kept.append(_sample(position, gradient, second))
        return cls(tuple(kept))

    def error(self, outputs: Sequence[Any]) -> float:
        """The squared relative error of ``outputs``, preconditioned."""
        wrong = right = 0.0
        for s in self.samples:
            difference = s.seen(outputs[s.position]) - s.values
            wrong += s.stands_for * float((difference / s.scale).square().sum())
            right += s.stands_for * float((s.values / s.scale).square().sum())
        return wrong / right if right else 0.0


def _sample(position: int, gradient: torch.Tensor, second_moment: torch.Tensor | None) -> _Sample:
    count = gradient.numel()
    at = None
    if count > _SAMPLE:
        at = torch.randint(count, (_SAMPLE,), generator=torch.Generator().manual_seed(position)).to(gradient.device)
    v = (second_moment if second_moment is not None else _expected_square(gradient)).reshape(-1)
    v = (v if at is None else v[at]).double()
    scale = torch.where(v > 0, v.sqrt(), torch.inf)  # what never has a gradient is never stepped
    sample = _Sample(position, at, torch.empty(0), scale, count / len(v))
    return replace(sample, values=sample.seen(gradient))


def _expected_square(gradient: torch.Tensor) -> torch.Tensor:
    """Of each coordinate, from one gradient: the product of its row's and its column's mean, as Adafactor keeps it (Shazeer and
    Stern, 2018, arXiv 1804.04235, algorithm 4)."""
    square = gradient.detach().float().square()
    if square.dim() < 2:
        return square.mean().expand(square.shape)
    square = square.flatten(0, -2)
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    return (rows * columns / square.mean().clamp_min(1e-38)).reshape(gradient.shape)

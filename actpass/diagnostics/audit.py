"""What the forms do to the gradient of one batch: `actpass.audit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from actpass.backend.dynamo_graph import prepared
from actpass.backend.headroom import peak_budget
from actpass.backend.partitioner import run_passes_with_state
from actpass.backend.state_inputs import RegionRequest
from actpass.codecs.generator import region_keys, round_keys, step_seed
from actpass.diagnostics.interpreter import interpret, isolated_forward, own_errors, own_gradients, preserve_buffers_and_rng
from actpass.errors import OptionError
from actpass.ir.joint_graph import fold_indices
from actpass.options import Config, exactly
from actpass.reporting.report import table
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE, Store, WithSubspaces
from actpass.torch_compat import compile_fx, dynamo, functorch_config, vector_norm

Gradients = dict[str, torch.Tensor]

BLIND = (
    "The plain cosine is blind: a form can lose 1 % of the energy and a tenth of the progress, because Adam gives small "
    "directions the same step as large ones. Judge by the preconditioned cosine, and by the loss."
)


@dataclass(frozen=True, slots=True)
class ParameterAudit:
    """One parameter's gradient, over K seeds, against the exact one.

    error: |g - g_exact| / |g_exact|, root mean square over the seeds. cosine: with the exact gradient, mean.
    preconditioned_cosine: of the step's direction, mean: the sign of the gradient, or Adam's m / sqrt(v) after this
    gradient if an optimizer with state was given. bias_z: the larger |z| of the mean difference along the exact gradient and
    along a fixed random direction; above 4 the gradient is biased. None for one seed, or where nothing is random.
    """

    name: str
    numel: int
    error: float
    cosine: float
    preconditioned_cosine: float
    bias_z: float | None


@dataclass(frozen=True)
class Audit:
    """parameters: worst preconditioned cosine first. direction: ``sign`` or ``adam``. ``str(audit)`` is a table."""

    parameters: tuple[ParameterAudit, ...]
    direction: str
    seeds: int

    def to_dict(self) -> dict[str, Any]:
        return {"direction": self.direction, "seeds": self.seeds, "parameters": [asdict(p) for p in self.parameters]}

    def __str__(self) -> str:
        groups: dict[str, list[ParameterAudit]] = {}
        for p in self.parameters:
            groups.setdefault(fold_indices(p.name), []).append(p)
        header = ("parameter", "relative error", "cosine", f"cosine of {self.direction} direction", "bias z")
        rows = [header, *(_cells(name, members) for name, members in groups.items())]
        return "\n".join([f"gradient against exact, {self.seeds} seeds, worst of each row", *table(rows), BLIND])


def _cells(folded: str, members: Sequence[ParameterAudit]) -> tuple[str, ...]:
    z = max((p.bias_z for p in members if p.bias_z is not None), default=None)
    return (
        folded if len(members) > 1 else members[0].name,
        f"{max(p.error for p in members):.2e}",
        f"{min(p.cosine for p in members):.4f}",
        f"{min(p.preconditioned_cosine for p in members):.4f}",
        "NOT FINITE"
        if any(math.isnan(p.error) for p in members)
        else "-"
        if z is None
        else f"{z:.1f}{' BIASED' if z > 4 else ''}",
    )


def audit_model(
    model: torch.nn.Module,
    batch: tuple[tuple[Any, ...], Mapping[str, Any]],
    config: Config,
    seeds: Any,
    optimizer: torch.optim.Optimizer | None,
    loss: Callable[[Any], torch.Tensor] | None,
) -> Audit:
    """See `actpass.audit`. batch: positional and keyword arguments of the model."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise OptionError(f"seeds={seeds!r} is not usable. Allowed: an int >= 1.")
    model = getattr(model, "_orig_mod", model)
    step = _Step(model, *batch, loss or loss_of)
    exact = step.compile(exactly(config))(0)
    direction = _Adam(model, optimizer) if optimizer is not None and optimizer.state else _sign
    sums = {name: _Sums.start(g) for name, g in exact.items()}
    gradients = step.compile(config)
    for draw in range(seeds):
        for name, gradient in gradients(draw).items():
            sums[name].add(gradient, exact[name], direction(name, gradient), direction(name, exact[name]))
    found = [s.finish(name, exact[name]) for name, s in sums.items()]
    found.sort(key=lambda p: (not math.isnan(p.error), p.preconditioned_cosine, p.name))  # what is broken comes first
    return Audit(tuple(found), "sign" if direction is _sign else "Adam", seeds)


def loss_of(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise OptionError(
            f"the model returned {type(output).__name__}, and no loss is found in it. Let it return a loss or an object with "
            "`.loss`, or pass loss=lambda output: ..."
        )
    return found


@dataclass
class _Sums:
    """Running sums over the seeds, so that no gradient is kept."""

    random: torch.Tensor
    error: float = 0.0
    cosine: float = 0.0
    preconditioned: float = 0.0
    count: int = 0
    along: tuple[float, ...] = ()
    across: tuple[float, ...] = ()

    @classmethod
    def start(cls, gradient: torch.Tensor) -> _Sums:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, gradient.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return cls(signs)

    def add(self, g: torch.Tensor, exact: torch.Tensor, step: torch.Tensor, exact_step: torch.Tensor) -> None:
        difference = g.double() - exact.double()
        self.error += float(difference.square().sum())
        self.cosine += _cosine(g, exact)
        self.preconditioned += _cosine(step, exact_step)
        self.along += (float((difference * exact.double()).sum()),)
        self.across += (float((difference * self.random.to(g.device)).sum()),)
        self.count += 1

    def finish(self, name: str, exact: torch.Tensor) -> ParameterAudit:
        energy = max(float(exact.double().square().sum()), 1e-300)
        scores = [z for z in (_z(self.along), _z(self.across)) if z is not None]
        return ParameterAudit(
            name,
            exact.numel(),
            (self.error / self.count / energy) ** 0.5,
            self.cosine / self.count,
            self.preconditioned / self.count,
            max(scores, default=None),
        )


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    scale = float(vector_norm(a) * vector_norm(b))
    return float(a @ b) / scale if scale else 1.0 if torch.equal(a, b) else 0.0


def _z(values: Sequence[float]) -> float | None:
    """|mean| in standard errors; None if there is no spread to measure it by."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return abs(mean) / (variance / count) ** 0.5 if variance > 0 else None


def _sign(name: str, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sign()


class _Adam:
    """Adam's direction m / (sqrt(v) + eps) after one more gradient, from an optimizer's state (``exp_avg``, ``exp_avg_sq``)."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.of = {name: (optimizer.state.get(p, {}), groups.get(id(p), {})) for name, p in model.named_parameters()}

    def __call__(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        state, group = self.of[name]
        if "exp_avg" not in state or "exp_avg_sq" not in state or "basis_draw" in state:  # none, or of coefficients
            return gradient.sign()
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        steps = int(state.get("step", 0)) + 1
        m = (beta1 * state["exp_avg"] + (1 - beta1) * gradient) / (1 - beta1**steps)
        v = (beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()) / (1 - beta2**steps)
        return m / (v.sqrt() + group.get("eps", 1e-8))


@dataclass(frozen=True)
class _Step:
    """One forward and backward of ``model``, through interpreted graphs; leaves the model as it was."""

    model: torch.nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], torch.Tensor]

    def compile(self, config: Config) -> Callable[[int], Gradients]:
        """The gradients under ``config`` as a function of the draw. Dropout masks are the same in all."""
        config = replace(
            config, inductor_options=(*config.inductor_options, ("fallback_random", True))
        )  # seeds mean nothing to an interpreter
        seed = config.seed

        def backend(gm: fx.GraphModule, example_inputs: list[Any], **more: Any) -> Any:
            gm, _ = prepared(gm, example_inputs, config)
            with functorch_config.patch(enable_autograd_cache=False):
                request = RegionRequest.of(gm, example_inputs, config, peak=peak_budget(config, example_inputs))
                _, fn, extra = run_passes_with_state(request, compile_fx, inner_compile=interpret, dense=True)
            device, plain = request.device, request.inputs
            if extra.sites:
                own = Store(STORE)  # those of the training run stay as they are
                run = WithSubspaces(fn=fn, sites=extra.sites, config=config, device=device, store=own, written=plain.written)

                def learned(*args: Any) -> Any:
                    return run(args, [region_keys(seed, seed, device), round_keys(seed, device)], STEP_COUNTER.steps)

                return learned

            def seeded(*args: Any) -> Any:
                return fn(*args, region_keys(seed, seed, device))

            return seeded if config.needs_seed else fn

        forward = dynamo.optimize(backend)(isolated_forward(self.model))

        def gradients(draw: int) -> Gradients:
            nonlocal seed
            seed = step_seed(config.seed, draw)
            with torch.enable_grad(), preserve_buffers_and_rng(self.model), own_gradients(self.model), own_errors():
                loss: Any = self.loss(forward(*self.inputs, **self.kwargs))
                loss.backward()
                return {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}

        return gradients

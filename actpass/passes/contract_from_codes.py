"""Form weight gradients of codes in 8 bits, before the cut: dW = dy^T x becomes one matmul in fp8 of the codes of dy and x.

Before, and after, with x (T, N) and dy (T, M)::

    dW = mm(dy^T, x)
    codes_x, scale_x = cast(x^T); codes_dy, scale_dy = cast(dy^T); dW = _scaled_mm(codes_dy, codes_x^T, scale_dy, scale_x^T)

x is cast once for all weight gradients that read it, and so is dy. Where the decision says ``forward`` the codes of x cross to
the backward in place of x; where it says ``backward`` x is there anyway, or is rebuilt for free. See
`actpass.codecs.fp8_contraction` for the numbers, and docs/guide/methods.md for where it pays.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.analysis.weight_gradients import WeightGradientMatmul
from actpass.codecs.fp8_contraction import cast, multiply, noise, scale_of, scaled_by_row
from actpass.errors import GraphUnsupported, OptionError
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, is_view, module_path, rule_of, value
from actpass.ir.op_queries import FOR_CODES, OF_A_SCALE, factors_of
from actpass.ir.traversal import ancestors
from actpass.passes.base import RegionState
from actpass.passes.project_weight_gradients import BACKWARD_ONLY
from actpass.plan import Decision

Codes = tuple[fx.Node, fx.Node]
"""The codes of a tensor, (R, 1, T), and their scale."""
LEAST_CAPABILITY = (9, 0)
"""Of a CUDA device whose matmuls in fp8 take both factors with scales (Hopper)."""


@dataclass(frozen=True)
class ContractFromCodes:
    """Raises `OptionError` where the device has no matmuls in fp8. A CPU does, for what they do to a loss: it forms the same
    numbers, and saves no time."""

    name: str = "contract_from_codes"
    serves: str | None = "weight gradients in fp8"

    def run(self, state: RegionState) -> RegionState:
        if not state.plan.from_codes:
            return state
        state = state.on_a_copy()
        casting = _Casting(state.joint, state)
        for decision in state.plan.from_codes:
            casting.carry_out(decision)
        casting.editor.clean()
        return replace(
            state.with_graph(casting.editor.module),
            inserted=state.inserted | frozenset(casting.editor.inserted),
            payloads={**state.payloads, **{d: codes.name for d, (codes, _) in casting.codes.items()}},
            scales={d: scale.name for d, (_, scale) in casting.codes.items()},
        )

    def check(self, before: RegionState, after: RegionState) -> None:
        """Forward outputs, input gradients and the gradients of unplanned parameters read no node that was inserted here; all
        that reads the codes of x, but views, is a matmul in fp8; and no weight gradient of the plan reads x itself."""
        if not after.plan.from_codes:
            return
        joint, nodes = after.joint, {n.name: n for n in after.joint.gm.graph.nodes}
        known = {n.name for n in before.joint.gm.graph.nodes}
        planned = {path for d in after.plan.decisions if d.projects or d.wgrad for path in d.parameters}
        free = [g for primal, g in joint.gradients if joint.parameter_path.get(primal) not in planned]
        mine = {n for n in after.inserted if n.name not in known}
        touched = ancestors([*joint.forward_outputs, *free]).intersection(mine)
        if touched:
            raise AssertionError(f"weight gradients in fp8 reached a value that they must not change, through {min(touched)}")
        for d in after.plan.from_codes:
            left = [m for m in d.matmuls if m in nodes]
            foreign = [u for u in _readers(nodes[after.payloads[d]]) if u.target is not torch.ops.aten._scaled_mm.default]
            if left or foreign:
                raise AssertionError(f"{(left or foreign)[0]} forms a weight gradient that {d.site} was cast for")


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the numbers of ``node``, through views."""
    return [reader for user in node.users for reader in (_readers(user) if is_view(user) else [user])]


def check_device(device: torch.device) -> None:
    """Raises `OptionError` where ``device`` has no matmul that takes codes in fp8 with scales."""
    least = ".".join(map(str, LEAST_CAPABILITY))
    allowed = f"Allowed: a CUDA device of capability {least} (Hopper) or newer, or a CPU, which emulates it. Leave wgrad out."
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise OptionError(f"wgrad='fp8' is not possible on the device {device}. {allowed}")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        has = ".".join(map(str, capability))
        raise OptionError(f"wgrad='fp8' is not possible on the device {device}, whose capability is {has}. {allowed}")


@dataclass
class _Casting:
    joint: Joint
    state: RegionState
    codes: dict[Decision, Codes] = field(default_factory=dict[Decision, Codes])

    def __post_init__(self) -> None:
        self.editor = GraphEditor(self.joint.gm)
        self.nodes = {n.name: n for n in self.joint.gm.graph.nodes}
        self.found: Mapping[str, WeightGradientMatmul] = {c.node: c for c in self.state.finding.contractions}
        self.cast_dys: dict[tuple[fx.Node, bool, bool, str | None], Codes] = {}

    def carry_out(self, decision: Decision) -> None:
        x, members = self.nodes[decision.site], [self.found[name] for name in decision.matmuls]
        check_device(value(x).device)
        left, by_row = members[0].left, scaled_by_row(value(self.nodes[members[0].node]).dtype)
        in_forward = decision.project_in == "forward"
        codes = self._cast(x, not left, by_row, decision)
        self.codes[decision] = codes
        for node in codes:  # of what is before them upstream may take others for the same, which the forward needs
            node.meta.update({"recompute": CheckpointPolicy.MUST_SAVE} if in_forward else BACKWARD_ONLY)
        for member in members:
            self._replace(self.nodes[member.node], codes, by_row, decision, left=left)

    def _cast(self, factor: fx.Node, transpose: bool, by_row: bool, decision: Decision) -> Codes:
        """The codes of ``factor``, or of its transpose."""
        val = value(factor)
        features, tokens = reversed(val.shape) if transpose else val.shape
        drawn: tuple[fx.Node, ...] = ()
        if decision.rounding == "stochastic":
            drawn = self._noise(factor, (int(features), int(tokens)), decision)

        def largest(x: torch.Tensor) -> torch.Tensor:
            return scale_of(x.t() if transpose else x, by_row=by_row)

        def encode(x: torch.Tensor, scale: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
            return cast(x.t() if transpose else x, scale, drawn)

        marks = {FOR_CODES: decision.parameters}
        scale = self.editor.splice(largest, [factor], after=factor, like=factor, marks={**marks, OF_A_SCALE: True})
        return self.editor.splice(encode, [factor, scale, *drawn], after=factor, like=factor, marks=marks), scale

    def _noise(self, factor: fx.Node, shape: tuple[int, int], decision: Decision) -> tuple[fx.Node, ...]:
        """The random numbers of ``factor`` alone: a product of two that were rounded by the same ones would be biased."""
        seed = self.joint.seed
        if seed is None:
            raise GraphUnsupported("the step's seed did not arrive in the joint graph")
        draw = zlib.crc32(repr((factor.name, module_path(factor), shape, decision.parameters)).encode())

        def draw_noise(seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return noise(seed, *shape, draw)

        return self.editor.splice(draw_noise, [seed], after=factor, like=factor)

    def _replace(self, matmul: fx.Node, codes: Codes, by_row: bool, decision: Decision, *, left: bool) -> None:
        """Put the matmul in fp8 where ``matmul`` was."""
        row = rule_of(matmul).matmul
        assert row is not None
        dy = factors_of(matmul)[1 if left else 0]
        key = (dy, left, by_row, decision.rounding)
        if key not in self.cast_dys:
            self.cast_dys[key] = self._cast(dy, left, by_row, decision)
        factors = (*codes, *self.cast_dys[key]) if left else (*self.cast_dys[key], *codes)
        dtype, addends = value(matmul).dtype, () if row.addend is None else (matmul.args[row.addend],)

        def gradient(
            a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, *addend: torch.Tensor
        ) -> torch.Tensor:
            product = multiply(a, scale_a, b, scale_b, dtype)
            return addend[0] + product if addend else product

        new = self.editor.splice(gradient, [*factors, *addends], after=matmul, like=matmul)
        old = value(matmul)
        if value(new).shape != old.shape or value(new).dtype != old.dtype:
            raise GraphUnsupported(f"{matmul.name}: {tuple(value(new).shape)} in place of {tuple(old.shape)}")
        matmul.replace_all_uses_with(new)

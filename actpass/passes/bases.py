"""Insert what makes bases, seeded and learned, and sketches of what they project."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from actpass.codecs import LEARNED, PROJECTIONS, LearnedProjection
from actpass.codecs.projections.learned import sketch, state_shape
from actpass.errors import GraphUnsupported
from actpass.ir.editor import GraphEditor, run_in_mode
from actpass.ir.joint_graph import Joint, is_view, value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.plan import Decision, Plan


class Bases:
    """The bases of one graph: one seeded basis for all sites of a (method, width, rank, dtype), a learned one for each site.
    Both passes may draw them: their own matmuls are no matmul of the model."""

    def __init__(self, editor: GraphEditor) -> None:
        self.editor = editor
        self._known: dict[Hashable, fx.Node] = {}

    def seeded(self, decision: Decision, x: fx.Node, seed: fx.Node | None) -> fx.Node:
        """The basis that ``x`` is projected with."""
        val, width = value(x), decision.width
        key = (decision.projection, width, decision.rank, decision.projection_scaling, val.dtype, val.device)
        if key not in self._known:
            if seed is None:
                raise GraphUnsupported("the step's seed did not arrive in the joint graph")
            seeded, rank = PROJECTIONS[decision.projection], decision.rank
            assert rank is not None

            def draw(seed: torch.Tensor) -> torch.Tensor:
                return seeded.basis(seed, width, rank, unbiased=decision.projection_scaling == "unbiased", dtype=val.dtype)

            self._known[key] = self._drawn(draw, [seed], seed, None)
        return self._known[key]

    def learned(
        self,
        decision: Decision,
        dtype: torch.dtype,
        drawn_from: tuple[fx.Node | None, fx.Node | None],
        after: fx.Node | None = None,
        sequence: int = 0,
    ) -> fx.Node:
        """The basis of a learned subspace. drawn_from: the subspace, None where none has arrived yet (the compiler asks which
        there will be; zeros stand for it then), and the seed of what is random in it. after: where to draw it; None: where the
        graph begins. sequence: of random numbers: sites of one are random alike."""
        projection, width, rank = LEARNED[decision.projection], decision.width, decision.rank
        state, seed = drawn_from
        assert rank is not None
        if seed is None:
            raise GraphUnsupported(f"the seed for the basis of {decision.site} did not arrive")
        if state is None:

            def nothing(seed: torch.Tensor) -> torch.Tensor:
                return torch.zeros(width, rank, dtype=dtype, device=seed.device)

            return self._drawn(nothing, [seed], seed, after)
        if tuple(value(state).shape) != state_shape(projection, width, rank):
            raise GraphUnsupported(f"a subspace of {tuple(value(state).shape)} arrived for {decision.site}")
        noise = self._noise(projection, (width, rank, sequence), seed, after) if projection.draws else None

        def draw(state: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
            return projection.draw(state, noise, rank).to(dtype)

        return self._drawn(draw, [state, noise], seed, after)

    def _noise(
        self, projection: LearnedProjection, what: tuple[int, int, int], seed: fx.Node, after: fx.Node | None
    ) -> fx.Node:
        """What is drawn for the bases of a width, a rank and a sequence, once. Behind ``after``: what Inductor makes in one go
        on a CPU takes its memory in one go, and the numbers of a basis are summed from twelve times their bytes."""
        key = (projection.name, *what)
        if key not in self._known:

            def noise(seed: torch.Tensor) -> torch.Tensor | None:
                return projection.noise(seed, *what)

            self._known[key] = self._drawn(noise, [seed], seed, after)
        return self._known[key]

    def _drawn(self, draw: Callable[..., Any], arguments: Sequence[Any], seed: fx.Node, after: fx.Node | None) -> fx.Node:
        where = after if after is not None else self.editor.graph.find_nodes(op="placeholder")[-1]
        return self.editor.splice(draw, arguments, after=where, like=seed, marks={OF_A_BASIS: True})


class Sketches:
    """What a graph returns of its learned subspaces. Subspaces that have not arrived yet take none."""

    def __init__(self, editor: GraphEditor, joint: Joint) -> None:
        self.editor, self.points = editor, joint.points
        output = editor.graph.output_node()
        self._stand_ins = {s: n for s in joint.subspaces for n in s.users if output in n.users}
        self.taken: set[fx.Node] = set()

    def take(
        self, decision: Decision, x: fx.Node, z: fx.Node, state: fx.Node | None, *, left: bool = False, flat: bool = False
    ) -> None:
        """Return the sketch of ``x`` in place of what stands for it. z: the projection of ``x``, which the sketch reads where
        the forward computes it. left, flat: see `sketch`."""
        if state is None:
            return
        leading = LEARNED[decision.projection].leading(decision.rank or 0)
        known, given = (0, None) if _is_of_backward(z) else (leading, z)

        def take(x: torch.Tensor, state: torch.Tensor, points: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
            return sketch(x, state, points, left=left, flat=flat, z=z, known=known)

        x = self._in_forward(x)
        new = self.editor.splice(take, [x, state, self.points, given], after=x, like=x)
        self._stand_ins[state].replace_all_uses_with(new)
        self.taken.add(new)

    def _in_forward(self, x: fx.Node) -> fx.Node:
        """``x``, or a copy of it where autograd took a view only for the backward."""
        if not _is_of_backward(x):
            return x
        if not is_view(x):
            raise GraphUnsupported(f"{x.name} is computed in the backward, and no sketch can be taken of it in the forward")
        original = x.all_input_nodes[0]
        source = self._in_forward(original)
        copy = self.editor.copy_of(x, {original: source}, after=max(x, source))
        copy.meta.pop("partitioner_tag", None)
        copy.meta["val"] = run_in_mode(copy)
        return copy


def subspaces_of(joint: Joint, plan: Plan) -> dict[Decision, fx.Node]:
    """The subspace of each learned projection of ``plan``, in the order in which a region takes them; none where they have not
    arrived yet."""
    learned = [d for d in plan.projections if d.projection in LEARNED]
    if not joint.subspaces:
        return {}
    if len(joint.subspaces) < len(learned):
        raise GraphUnsupported(f"{len(joint.subspaces)} subspaces arrived for {len(learned)} sites")
    return dict(zip(learned, joint.subspaces, strict=False))


def _is_of_backward(node: fx.Node) -> bool:
    return "backward" in str(node.meta.get("partitioner_tag", ""))

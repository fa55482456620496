"""Insert what makes bases, seeded and learned, and sketches of what they project."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.codecs import LEARNED, PROJECTIONS, LearnedProjection
from actpass.codecs.projections.learned import sample_tokens, sketch, sketch_of, state_shape
from actpass.errors import GraphUnsupported
from actpass.ir.editor import GraphEditor, run_in_mode
from actpass.ir.joint_graph import Joint, is_view, value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.passes.in_batches import batches
from actpass.plan import Decision, Plan
from actpass.torch_compat import is_data_dependent, size_hint


@dataclass(frozen=True)
class LearnedBasis:
    """The basis of a learned subspace that is to be drawn.

    state: the subspace; None where none has arrived yet (the compiler asks which there will be; zeros stand for it then). seed:
    of what is random in it. before: its first reader, or what is to follow it. sequence: of random numbers: sites of one are
    random alike.
    """

    decision: Decision
    dtype: torch.dtype
    state: fx.Node | None
    seed: fx.Node
    before: fx.Node
    sequence: int = 0

    @property
    def projection(self) -> LearnedProjection:
        return LEARNED[self.decision.projection]

    @property
    def rank(self) -> int:
        assert self.decision.rank is not None
        return self.decision.rank

    @property
    def nbytes(self) -> int:
        """Of the basis in float32, as it is drawn."""
        return 4 * self.decision.width * self.rank

    @property
    def kind(self) -> object:
        """Equal for bases that may be drawn in one batch. One that is a part of its subspace as it is costs no kernel."""
        costs = self.state is not None and (self.projection.draws or self.dtype != torch.float32)
        return (self.decision.projection, self.decision.width, self.rank, self.dtype) if costs else self


class Bases:
    """The bases of one graph: one seeded basis for all sites of a (method, width, rank, dtype), a learned one for each site.
    Both passes may draw them: their own matmuls are no matmul of the model. most: bytes of learned bases that are drawn
    together (see `most_beside`)."""

    def __init__(self, editor: GraphEditor, most: int) -> None:
        self.editor, self.most = editor, most
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

    def learned(self, wanted: Sequence[LearnedBasis]) -> list[fx.Node]:
        """The bases of learned subspaces, in the order in which they are asked for. Those of one size are drawn in batches of
        `most` bytes: a GPU takes as long for one as for many."""
        made: dict[int, fx.Node] = {}
        for batch in batches(enumerate(wanted), lambda m: m[1].kind, lambda m: m[1].nbytes, self.most):
            members = [w for _, w in batch]
            drawn = self._together(members) if len(members) > 1 else [self._alone(members[0])]
            made.update(zip((i for i, _ in batch), drawn, strict=True))
        return [made[i] for i in range(len(wanted))]

    def _alone(self, wanted: LearnedBasis) -> fx.Node:
        rank, dtype, seed = wanted.rank, wanted.dtype, wanted.seed
        if wanted.state is None:

            def nothing(seed: torch.Tensor) -> torch.Tensor:
                return torch.zeros(wanted.decision.width, rank, dtype=dtype, device=seed.device)

            return self._drawn(nothing, [seed], seed, wanted.before)

        def draw(state: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
            return wanted.projection.draw(state, noise, rank).to(dtype)

        return self._drawn(draw, [wanted.state, self._noise(wanted, wanted.before)], seed, wanted.before)

    def _together(self, batch: Sequence[LearnedBasis]) -> Sequence[fx.Node]:
        """As views of one tensor."""
        first, before, count = batch[0], min(w.before for w in batch), len(batch)
        noises = dict.fromkeys(self._noise(w, before) for w in batch)

        def draw(*given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            noise = given[count] if len(given) == count + 1 else torch.stack(given[count:])  # pyright: ignore[reportArgumentType]
            states = torch.stack(given[:count])  # pyright: ignore[reportArgumentType]
            return first.projection.draw(states, noise, first.rank).to(first.dtype).unbind()

        return self._drawn(draw, [*(w.state for w in batch), *noises], first.seed, before)

    def _noise(self, wanted: LearnedBasis, before: fx.Node) -> fx.Node | None:
        """What is drawn, if anything is, for the bases of a width, a rank and a sequence, once. Each by itself, where it is
        read: what Inductor makes in one go on a CPU takes its memory in one go, and the numbers of a basis are summed from
        twelve times their bytes."""
        if not wanted.projection.draws:
            return None
        what = wanted.decision.width, wanted.rank, wanted.sequence
        key = (wanted.projection.name, *what)
        if key not in self._known:

            def noise(seed: torch.Tensor) -> torch.Tensor | None:
                return wanted.projection.noise(seed, *what)

            self._known[key] = self._drawn(noise, [wanted.seed], wanted.seed, before)
        return self._known[key]

    def _drawn(self, draw: Callable[..., Any], arguments: Sequence[Any], seed: fx.Node, before: fx.Node | None) -> Any:
        last = self.editor.graph.find_nodes(op="placeholder")[-1]
        where = last if before is None else max(before.prev, last)
        return self.editor.splice(draw, arguments, after=where, like=seed, marks={OF_A_BASIS: True})


@dataclass(frozen=True)
class _Sketched:
    """A sketch that is to be taken of ``x``. z: its projection, of whose columns the first ``known`` are read. left, flat: see
    `sample_tokens`."""

    x: fx.Node
    state: fx.Node
    z: fx.Node | None
    known: int
    left: bool
    flat: bool

    @property
    def sampled(self) -> list[Any]:
        """The shape of the sampled tokens, but for how many points there are."""
        *leading, tokens, width = value(self.x).shape
        return [1 if self.flat else math.prod(leading), tokens if self.left else width]


class Sketches:
    """What a graph returns of its learned subspaces. Subspaces that have not arrived yet take none. most: bytes of the sampled
    tokens of which sketches are taken together (see `most_beside`)."""

    def __init__(self, editor: GraphEditor, joint: Joint, most: int) -> None:
        self.editor, self.points, self.most = editor, joint.points, most
        output = editor.graph.output_node()
        self._stand_ins = {s: n for s in joint.subspaces for n in s.users if output in n.users}
        self._wanted: list[_Sketched] = []

    def want(
        self, decision: Decision, x: fx.Node, z: fx.Node, state: fx.Node | None, *, left: bool = False, flat: bool = False
    ) -> None:
        """Return the sketch of ``x`` in place of what stands for it, once `take` is called. z: the projection of ``x``, which
        the sketch reads where the forward computes it. left, flat: see `sample_tokens`."""
        if state is not None:
            leading = LEARNED[decision.projection].leading(decision.rank or 0)
            known, given = (0, None) if _is_of_backward(z) else (leading, z)
            self._wanted.append(_Sketched(self._in_forward(x), state, given, known, left, flat))

    def take(self) -> frozenset[fx.Node]:
        """Insert all that are wanted, those of one size in batches; returns what the graph returns now."""
        taken: set[fx.Node] = set()
        for batch in batches(self._wanted, _kind, self._sampled_bytes, self.most):
            made = self._together(batch) if len(batch) > 1 else [self._alone(batch[0])]
            for wanted, new in zip(batch, made, strict=True):
                self._stand_ins[wanted.state].replace_all_uses_with(new)
                taken.add(new)
        return frozenset(taken)

    def _alone(self, wanted: _Sketched) -> fx.Node:
        def take(x: torch.Tensor, state: torch.Tensor, points: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
            return sketch(x, state, points, left=wanted.left, flat=wanted.flat, z=z, known=wanted.known)

        arguments = [wanted.x, wanted.state, self.points, wanted.z]
        return self.editor.splice(take, arguments, after=wanted.x, like=wanted.x)

    def _together(self, batch: Sequence[_Sketched]) -> Sequence[fx.Node]:
        """As views of one tensor. Sampled tokens wait until their batch is whole; what z knows is computed again, which takes
        less than to gather it."""

        def sample(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            return sample_tokens(x, points, left=batch[0].left, flat=batch[0].flat)

        def take(_: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return sketch_of(torch.stack(given[: len(batch)]), torch.stack(given[len(batch) :])).unbind()

        samples = [self.editor.splice(sample, [w.x, self.points], after=w.x, like=w.x) for w in batch]
        last = max(samples)
        # the points first: a size that no input of the graph shows is unknown to Inductor (torch 2.14)
        return self.editor.splice(take, [self.points, *samples, *(w.state for w in batch)], after=last, like=last)

    def _sampled_bytes(self, wanted: _Sketched) -> int:
        assert self.points is not None
        experts, width = wanted.sampled
        return 4 * size_hint(value(self.points).numel() * experts * width)

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


def _kind(wanted: _Sketched) -> object:
    """Equal for sketches that may be taken in one batch. Of what may be empty a sketch is taken by itself."""
    experts, width = wanted.sampled
    if any(is_data_dependent(size) or size_hint(size) == 0 for size in value(wanted.x).shape):
        return wanted
    return value(wanted.state).shape, wanted.left, wanted.flat, str(experts), width


def seed_of(decision: Decision, seed: fx.Node | None) -> fx.Node:
    """``seed``. Raises `GraphUnsupported` where it did not arrive."""
    if seed is None:
        raise GraphUnsupported(f"the seed for the basis of {decision.site} did not arrive")
    return seed


def subspaces_of(joint: Joint, plan: Plan) -> dict[Decision, fx.Node]:
    """The subspace of each learned projection of ``plan``, in the order in which a region takes them. None where they have not
    arrived yet, or others have (the region is then compiled again with those of its plan)."""
    learned = [d for d in plan.projections if d.projection in LEARNED]
    given = dict(zip(learned, joint.subspaces, strict=False))
    fit = len(given) == len(learned) and all(tuple(value(s).shape) == _state_shape(d) for d, s in given.items())
    return given if fit else {}


def _state_shape(decision: Decision) -> tuple[int, int]:
    assert decision.projection is not None
    assert decision.rank is not None
    return state_shape(LEARNED[decision.projection], decision.width, decision.rank)


def _is_of_backward(node: fx.Node) -> bool:
    return "backward" in str(node.meta.get("partitioner_tag", ""))

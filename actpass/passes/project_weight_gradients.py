"""Carry a plan out in the joint graph, before the cut: dW = dy^T x becomes (dy^T (x P)) P^T.

Codecs are plain tensor functions; `splice` traces one with ``make_fx`` under the graph's own fake mode and Inductor's
decompositions and copies the nodes in, so every inserted node carries a real fake value and no one writes FX.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.analysis.weight_gradients import Contraction
from actpass.codecs import LEARNED, PROJECTIONS, LearnedProjection, contract, encode
from actpass.codecs.projections.learned import sketch, state_shape
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import Joint, is_view, rule_of, value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.plan import Decision, Plan
from actpass.torch_compat import FakeTensorMode, detect_fake_mode, invoke_subgraph, select_decomp_table

BACKWARD_ONLY = "must_be_in_backward"


@dataclass
class Rewritten:
    """What `rewrite` did. inserted: every new node. payloads: projected decision -> node of its z. sketches: what is returned
    of each learned subspace. lifts: a weight gradient as it is formed now -> its coefficients and the decision; without those
    that something is added to in the same matmul."""

    inserted: set[fx.Node] = field(default_factory=set)
    payloads: dict[Decision, str] = field(default_factory=dict)
    sketches: set[fx.Node] = field(default_factory=set)
    lifts: dict[fx.Node, tuple[fx.Node, Contraction, Decision]] = field(default_factory=dict)


def rewrite(joint: Joint, contractions: Sequence[Contraction], plan: Plan) -> Rewritten:
    """Rewrite ``joint`` in place. One seeded basis for all sites of a (method, width, rank, dtype), a learned one for each
    site; one z for all readers of x. Where the subspaces have not arrived yet (the compiler asks which there will be), a
    basis of zeros stands for a learned one."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    found = {c.node: c for c in contractions}
    done = Rewritten()
    bases: dict[Any, fx.Node] = {}
    stand_ins = returned(joint)
    states = subspaces_of(joint, plan)
    for decision in plan.contracted:
        members = [found[name] for name in decision.matmuls]
        x = nodes[decision.site]
        if decision.method in LEARNED:
            state = states.get(decision)
            seed = joint.seed if state is None else joint.learned_seed
            basis = learned_basis(joint.gm.graph, bases, decision, value(x).dtype, state, seed, done)
        else:
            state, basis = None, _basis(joint, bases, decision, x, done)
        z = _payload(joint, x, basis, decision, members[0].left, done)
        if state is not None:
            sketch_of(joint, decision, stand_ins[state], x, z, state, members[0].left, done)
        for contraction in members:
            _replace(joint, nodes[contraction.node], z, basis, contraction, decision, done)
    joint.gm.graph.eliminate_dead_code()
    joint.gm.graph.lint()
    done.sketches = {n for n in done.sketches if n.graph is joint.gm.graph}
    done.inserted = {n for n in done.inserted if n.graph is joint.gm.graph and not n._erased}
    return done


def subspaces_of(joint: Joint, plan: Plan) -> dict[Decision, fx.Node]:
    """The subspace of each learned projection of ``plan``, in the order in which a region takes them; none where they have not
    arrived yet."""
    learned = [d for d in plan.projections if d.method in LEARNED]
    if not joint.subspaces:
        return {}
    if len(joint.subspaces) < len(learned):
        raise GraphUnsupported(f"{len(joint.subspaces)} subspaces arrived for {len(learned)} sites")
    return dict(zip(learned, joint.subspaces, strict=False))


def _basis(joint: Joint, bases: dict[Any, fx.Node], decision: Decision, x: fx.Node, done: Rewritten) -> fx.Node:
    val, width = value(x), decision.width
    key = (decision.method, width, decision.rank, decision.scale, val.dtype, val.device)
    if key not in bases:
        seed = joint.seed
        if seed is None:
            raise GraphUnsupported("the step's seed did not arrive in the joint graph")
        projection, rank = PROJECTIONS[decision.method], decision.rank
        assert rank is not None

        def draw(seed: torch.Tensor) -> torch.Tensor:
            return projection.basis(seed, width, rank, unbiased=decision.scale == "unbiased", dtype=val.dtype)

        bases[key] = _drawn(joint.gm.graph, draw, [seed], seed, done)
    return bases[key]


def _drawn(
    graph: fx.Graph,
    draw: Callable[..., Any],
    arguments: Sequence[Any],
    seed: fx.Node,
    done: Rewritten,
    after: fx.Node | None = None,
) -> fx.Node:
    """Insert what makes a basis, or a part of one. Both passes may draw it: its own matmuls are no matmul of the model."""
    before = set(done.inserted)
    where = after if after is not None else graph.find_nodes(op="placeholder")[-1]
    node = splice(graph, draw, arguments, after=where, like=seed, inserted=done.inserted)
    for new in done.inserted - before:
        new.meta[OF_A_BASIS] = True
    return node


def learned_basis(
    graph: fx.Graph,
    bases: dict[Any, fx.Node],
    decision: Decision,
    dtype: torch.dtype,
    state: fx.Node | None,
    seed: fx.Node | None,
    done: Rewritten,
    after: fx.Node | None = None,
    sequence: int = 0,
) -> fx.Node:
    """The basis of a learned subspace. state: the subspace; None where none has arrived yet (the compiler asks which there will
    be): zeros stand for it then. seed: of what is random in it. after: where to draw it; None: where the graph begins.
    sequence: of random numbers: sites of one are random alike."""
    method, width, rank = LEARNED[decision.method], decision.width, decision.rank
    assert rank is not None
    if seed is None:
        raise GraphUnsupported(f"the seed for the basis of {decision.site} did not arrive")
    if state is None:

        def nothing(seed: torch.Tensor) -> torch.Tensor:
            return torch.zeros(width, rank, dtype=dtype, device=seed.device)

        return _drawn(graph, nothing, [seed], seed, done, after)
    if tuple(value(state).shape) != state_shape(method, width, rank):
        raise GraphUnsupported(f"a subspace of {tuple(value(state).shape)} arrived for {decision.site}")
    noise = _noise(graph, bases, method, width, rank, sequence, seed, done, after)

    def draw(state: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return method.draw(state, noise, rank).to(dtype)

    return _drawn(graph, draw, [state, noise], seed, done, after)


def _noise(
    graph: fx.Graph,
    bases: dict[Any, fx.Node],
    method: LearnedProjection,
    width: int,
    rank: int,
    sequence: int,
    seed: fx.Node,
    done: Rewritten,
    after: fx.Node | None,
) -> fx.Node | None:
    """What is drawn for the bases of a shape and a sequence, once. Behind ``after``: what Inductor makes in one go on a CPU
    takes its memory in one go, and the numbers of a basis are summed from twelve times their bytes."""
    key = (method.name, width, rank, sequence)
    if not method.draws:
        return None
    if key not in bases:

        def noise(seed: torch.Tensor) -> torch.Tensor | None:
            return method.noise(seed, width, rank, sequence)

        bases[key] = _drawn(graph, noise, [seed], seed, done, after)
    return bases[key]


def returned(joint: Joint) -> dict[fx.Node, fx.Node]:
    """Subspace -> the node that the region returns in place of its sketch: the one that reads it."""
    (output,) = joint.gm.graph.find_nodes(op="output")
    return {s: n for s in joint.subspaces for n in s.users if output in n.users}


def sketch_of(
    joint: Joint, decision: Decision, stand_in: fx.Node, x: fx.Node, z: fx.Node, state: fx.Node, left: bool, done: Rewritten
) -> None:
    """Return the sketch of ``x`` in place of ``stand_in``. z: the projection of ``x``, which the sketch reads where the forward
    computes it."""
    leading = LEARNED[decision.method].leading(decision.rank or 0)
    known, given = (0, None) if _is_of_backward(z) else (leading, z)

    def take(x: torch.Tensor, state: torch.Tensor, points: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        return sketch(x, state, points, left=left, z=z, known=known)

    x = _in_forward(joint, x, done)
    new = splice(joint.gm.graph, take, [x, state, joint.points, given], after=x, like=x, inserted=done.inserted)
    stand_in.replace_all_uses_with(new)
    done.sketches.add(new)


def _is_of_backward(node: fx.Node) -> bool:
    return "backward" in str(node.meta.get("partitioner_tag", ""))


def _in_forward(joint: Joint, x: fx.Node, done: Rewritten) -> fx.Node:
    """``x``, or a copy of it where autograd took a view only for the backward."""
    if not _is_of_backward(x):
        return x
    if not is_view(x):
        raise GraphUnsupported(f"{x.name} is computed in the backward, and no sketch can be taken of it in the forward")
    source = _in_forward(joint, x.all_input_nodes[0], done)
    with joint.gm.graph.inserting_after(max(x, source)):
        copy = joint.gm.graph.node_copy(x, lambda n: source if n is x.all_input_nodes[0] else n)
    copy.meta.pop("partitioner_tag", None)
    args, kwargs = fx.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
    target: Any = copy.target
    with _mode([source]):
        copy.meta["val"] = target(*args, **kwargs)
    done.inserted.add(copy)
    return copy


def _payload(joint: Joint, x: fx.Node, basis: fx.Node, decision: Decision, left: bool, done: Rewritten) -> fx.Node:
    def project(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return encode(x.transpose(-1, -2) if left else x, basis)

    before = set(done.inserted)
    z = splice(joint.gm.graph, project, [x, basis], after=x, like=x, inserted=done.inserted)
    if decision.project_in == "backward":
        for node in done.inserted - before:
            node.meta["partitioner_tag"] = BACKWARD_ONLY
    done.payloads[decision] = z.name
    return z


def _replace(
    joint: Joint, matmul: fx.Node, z: fx.Node, basis: fx.Node, contraction: Contraction, decision: Decision, done: Rewritten
) -> None:
    """Put the factored gradient where ``matmul`` was."""
    row = rule_of(matmul).matmul
    assert row is not None
    i, j = row.factors
    dy = matmul.args[j if contraction.left else i]
    has_addend = row.addend is not None
    unadorned = torch.ops.aten.mm.default if value(z).dim() == 2 else torch.ops.aten.bmm.default
    product: Any = unadorned if has_addend else matmul.target
    others = matmul.args[:1] if has_addend else matmul.args[2:]

    def coefficients(z: torch.Tensor, dy: torch.Tensor, *others: Any) -> torch.Tensor:
        return product(*((z.transpose(-1, -2), dy) if contraction.left else (dy, z)), *others)

    def gradient(coefficients: torch.Tensor, basis: torch.Tensor, *addend: torch.Tensor) -> torch.Tensor:
        found = contract(coefficients, basis, left=contraction.left)
        return addend[0] + found if addend else found

    where: dict[str, Any] = {"after": matmul, "like": matmul, "inserted": done.inserted}
    factor = splice(joint.gm.graph, coefficients, [z, dy, *(() if has_addend else others)], **where)
    new = splice(joint.gm.graph, gradient, [factor, basis, *(others if has_addend else ())], **where)
    old = value(matmul)
    if value(new).shape != old.shape or value(new).dtype != old.dtype:
        raise GraphUnsupported(f"{matmul.name}: {tuple(value(new).shape)} in place of {tuple(old.shape)}")
    matmul.replace_all_uses_with(new)
    if not has_addend:
        done.lifts[new] = factor, contraction, decision


def spell_flips(gm: fx.GraphModule) -> None:
    """Write every flip of a fixed length as a read at indices, in place: the same numbers, and Inductor inlines both, but
    upstream rebuilds the one and not the other (2.13 and 2.15), and every table here knows what the one does."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.prims.rev.default):
        x: Any = node.args[0]
        lengths = {d: value(x).shape[d] for d in node.args[1]}  # pyright: ignore[reportGeneralTypeIssues]
        if all(isinstance(n, int) for n in lengths.values()):
            new = splice(gm.graph, _reading_backwards(lengths), [x], after=node, like=node, inserted=set())
            if value(new).stride() == value(node).stride():
                node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()


def _reading_backwards(lengths: Mapping[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that flips the axes whose ``lengths`` are given."""

    def flipped(x: torch.Tensor) -> torch.Tensor:
        for axis, length in lengths.items():
            at = torch.arange(length - 1, -1, -1, device=x.device)
            x = torch.ops.aten.index.Tensor(x, [*[None] * (axis % x.dim()), at])
        return x

    return flipped


def splice(
    graph: fx.Graph,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    after: fx.Node,
    like: fx.Node,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule] | None = None,
    key: Hashable = None,
) -> Any:
    """Insert ``function(*arguments)`` behind ``after`` and every argument; returns the node of its result, or the nodes of
    its results if it returns a tuple.

    like: the node whose provenance (module, line, stream annotations) and forward/backward tag the new nodes take over.
    inserted: receives the new nodes. traces: graphs of functions that were traced before, by ``key``: layers that repeat are
    traced once; the key says all that the traced graph depends on.
    """
    tensors = [a for a in arguments if isinstance(a, fx.Node)]
    mode = _mode(tensors)
    with mode, torch.no_grad():
        traced = _trace(function, arguments, {} if traces is None else traces, key)
        return _insert(graph, traced, arguments, max((after, *tensors)), like, inserted)


def call(
    module: fx.GraphModule,
    function: Callable[..., Any],
    arguments: Sequence[fx.Node],
    *,
    after: fx.Node,
    like: fx.Node,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule],
    key: Hashable,
) -> tuple[fx.Node, ...]:
    """As `splice`, for a ``function`` that returns a tuple, but it stays a graph of its own that is called: Inductor makes
    its code once for all calls of a ``key``, and fuses it with nothing around it.

    What it returns lies in memory of its own: behind its last reader Inductor takes the memory of an argument, or of a result,
    for something else, though another result may be a view of it (torch 2.13 to 2.15)."""
    position = max((after, *arguments))
    provenance = _provenance(like)
    sizes = _sizes(module.graph, arguments, inserted)
    with _mode(arguments), torch.no_grad():
        traced = _trace(lambda *given: _apart(function(*given[: len(arguments)]), given), [*arguments, *sizes], traces, key)
        (returned,) = traced.graph.find_nodes(op="output")
        values = [_fresh(value(n)) for n in returned.args[0]]
    name = _submodule(module, traced)
    made: list[fx.Node] = []

    def insert(op: str, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
        with module.graph.inserting_after(made[-1] if made else position):
            node = module.graph.create_node(op, target, args)
        node.meta = {**provenance, "val": val} if val is not None else dict(provenance)
        made.append(node)
        return node

    graph = insert("get_attr", name, (), None)
    whole = insert("call_function", invoke_subgraph, (graph, name, *arguments, *sizes), tuple(values))
    results = tuple(insert("call_function", operator.getitem, (whole, i), v) for i, v in enumerate(values))
    inserted.update(made)
    return results


def _apart(results: Sequence[torch.Tensor], given: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """``results``, those copied that share memory with ``given`` or with each other."""
    taken = {_memory(g) for g in given if isinstance(g, torch.Tensor)}
    apart: list[torch.Tensor] = []
    for result in results:
        apart.append(result.clone() if _memory(result) in taken else result)
        taken.add(_memory(result))
    return tuple(apart)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _sizes(graph: fx.Graph, arguments: Sequence[fx.Node], inserted: set[fx.Node]) -> list[fx.Node]:
    """Nodes of the symbols in the sizes of ``arguments`` (4 * s) of which none is a size by itself: a graph that is called
    knows no symbol but from its arguments."""
    sizes = [s for a in arguments for s in (*value(a).shape, *value(a).stride()) if isinstance(s, torch.SymInt)]
    known = {s.node.expr for s in sizes}
    missing = {symbol for expression in known for symbol in expression.free_symbols} - known
    return [_size(graph, symbol, inserted) for symbol in sorted(missing, key=str)]


def _size(graph: fx.Graph, symbol: object, inserted: set[fx.Node]) -> fx.Node:
    """The node of ``symbol``: an input of ``graph``, or a size of one."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if isinstance(node.meta.get("val"), torch.SymInt) and node.meta["val"].node.expr == symbol:
            return node
    for node in inputs:
        val = node.meta.get("val")
        for axis, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                with graph.inserting_after(inputs[-1]):
                    found = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                found.meta["val"] = size
                inserted.add(found)
                return found
    raise GraphUnsupported(f"no input of the graph has the size {symbol}")


def _submodule(module: fx.GraphModule, part: fx.GraphModule) -> str:
    """The name of ``part`` inside ``module``; adds it under a new one."""
    children = dict(module.named_children())
    known = next((name for name, child in children.items() if child is part), None)
    if known is not None:
        return known
    name = next(n for n in (f"actpass_{i}" for i in itertools.count()) if n not in children)
    module.add_submodule(name, part)
    return name


def _fresh(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _mode(tensors: Sequence[fx.Node]) -> FakeTensorMode:
    mode = detect_fake_mode([value(a) for a in tensors])
    if mode is None:
        raise GraphUnsupported("the joint graph carries no fake values")
    return mode


def _trace(
    function: Callable[..., Any], arguments: Sequence[Any], traces: dict[Any, fx.GraphModule], key: Hashable
) -> fx.GraphModule:
    if key not in traces:
        values = [value(a) if isinstance(a, fx.Node) else a for a in arguments]
        traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
        for node in traced.graph.nodes:  # annotations are text here, which Inductor's cache can't take into a key
            node.type = None
        traced.recompile()
        traces[key] = traced
    return traces[key]


def _provenance(like: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "desc", "recompute")}


def _insert(
    graph: fx.Graph, traced: fx.GraphModule, arguments: Sequence[Any], position: fx.Node, like: fx.Node, inserted: set[fx.Node]
) -> Any:
    """Copy ``traced`` behind ``position``. Every new node gets a fake value of its own, from running it: values that are shared
    would pass for one memory."""
    provenance = _provenance(like)
    environment: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: environment[n])
        if node.op == "get_attr":
            raise GraphUnsupported(f"the codec holds a constant tensor ({node.target}); build it from the seed instead")
        with graph.inserting_after(position):
            position = graph.node_copy(node, lambda n: environment[n])
        args, kwargs = fx.map_arg((position.args, position.kwargs), lambda n: n.meta["val"])
        target: Any = position.target
        position.meta = {**provenance, "val": target(*args, **kwargs)}
        environment[node] = position
        inserted.add(position)
    raise AssertionError("a traced graph ends in an output")

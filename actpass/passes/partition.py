"""Where to cut the joint graph: upstream's min-cut under three settings, and what crosses each cut."""

from __future__ import annotations

import operator
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph, Saved
from actpass.codecs import LEARNED
from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, builtin_name, is_tangent, is_view, rule_of, storage_root, tensor_bytes
from actpass.ir.op_cost import OF_A_BASIS
from actpass.ir.op_queries import FOR_CODES, is_attention, is_cast, is_free_to_repeat, is_matmul, is_pointwise
from actpass.ir.outputs import output_values, set_output_values
from actpass.ir.products import is_sum_in_place, products_of
from actpass.ir.traversal import ancestors, descendants
from actpass.passes.base import RegionState
from actpass.torch_compat import (
    REGION_BUDGET,
    CustomKnapsackSolver,
    OpOverload,
    functorch_config,
    min_cut_rematerialization_partition,
)

_SLACK, _SLACK_BYTES = 0.05, 16384
"""What may cross beyond the exact cut: a share of it where the forward also takes sketches (a mask in place of the bits that it
is made of), and in any case a few bytes: upstream may save a small derivative that the exact cut forms later."""


@dataclass(frozen=True)
class Partition:
    """Upstream's min-cut of the joint graph as it was rewritten; the exact cut, if it was not."""

    name: str = "partition"
    serves: str | None = "projections"

    def run(self, state: RegionState) -> RegionState:
        if not state.plan.rewrites:
            return replace(state, cut=state.exact)
        return replace(state, cut=cut(state.joint, state.joint_inputs, state.kwargs, state.constraints))

    def check(self, before: RegionState, after: RegionState) -> None:
        """Of what is not free the backward runs again what the constraints name, and nothing else (`run_again`). Less only
        where upstream finds fewer bytes that way, as where a projection is stored in place of what was to be rebuilt.

        And of every projected site, and of every one that is cast for its weight gradients, exactly what the plan says crosses.
        ``project_in="forward"``: z (its codes) crosses and x does not. ``"backward"``: z does not cross. And together no more
        bytes cross than in the exact cut, but for the bases and the seed."""
        _check_again(after)
        if not after.plan.rewrites:
            return
        now, exact, plan = after.cuts.swapped, after.cuts.exact, after.plan
        crossing = {s.name for s in now.saved} | now.roots
        nodes = {n.name: n for n in after.joint.gm.graph.nodes}
        for d in (*plan.contracted, *plan.from_codes):
            z, x = after.payloads[d], storage_root(nodes[d.site]).name if d.site in nodes else d.site
            if d.project_in == "backward" and z in crossing:
                raise GraphUnsupported(f"the payload of {d.site} crosses, but the plan projects it in the backward")
            if d.project_in == "forward" and (x in crossing or z not in crossing):
                raise GraphUnsupported(
                    f"the plan stores the payload of {d.site}, but {'x' if x in crossing else 'nothing'} crosses"
                )
        stored = {*after.payloads.values(), *after.scales.values()}
        own = {n.name for n in after.inserted} - stored
        state = sum(s.nbytes for s in now.saved if s.base in own or s.base in now.seeds)
        learned = any(d.projection in LEARNED for d in plan.projections)
        slack = max(_SLACK * exact.saved_bytes if learned else 0, _SLACK_BYTES)
        if now.saved_bytes - state > exact.saved_bytes + slack:
            raise GraphUnsupported(f"{now.saved_bytes} bytes cross, more than the {exact.saved_bytes} of the exact cut")


def _check_again(state: RegionState) -> None:
    if not (state.constraints.recompute or state.constraints.part):
        return  # upstream decides, or the budget that the user gave it
    unnamed = run_again(state.partitioned, state.joint) - state.constraints.recompute
    if unnamed:
        raise AssertionError(f"the backward runs {sorted(unnamed)} again, which the plan does not name")


_LEAST_BUDGET = 1e-9
"""Makes upstream ask its solver; at 0 it would run everything again."""


class _RunAgain(CustomKnapsackSolver):
    """Upstream's knapsack, answered: of the nodes that may run again, those that the plan names."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __call__(
        self, memory: list[float], joint_graph: fx.Graph, max_memory: float, node_info: Any, candidates: list[fx.Node]
    ) -> tuple[list[int], list[int]]:
        recompute = [i for i, node in enumerate(candidates) if node.name in self.names]
        return [i for i in range(len(candidates)) if i not in set(recompute)], recompute

    def uuid(self) -> Any:
        return tuple(sorted(self.names))


def cut(
    joint: Joint,
    joint_inputs: Sequence[object],
    partition_kwargs: Mapping[str, Any],
    constraints: PartitionConstraints,
) -> PartitionedGraph:
    """Run upstream's min-cut on a copy of ``joint``."""
    gm, _ = copy_module(joint.gm)
    patch: dict[str, Any] = {}
    aggressive = bool(constraints.recompute) or constraints.part
    if constraints.recompute_materialized:
        patch["ban_recompute_materialized_backward"] = patch["ban_recompute_used_far_apart"] = False
        own = Joint(gm, joint.inputs, joint.num_fwd_outputs, joint.static)
        _recompute_from_parameters(own)
        _release_what_layers_share(own)
    if constraints.stock is not None:
        patch["activation_memory_budget"] = constraints.stock
    once = _run_once(joint, constraints.recompute) if aggressive else frozenset[str]()
    for node in gm.graph.nodes:
        if node.name in constraints.must_save or node.name in once:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if aggressive:
        patch["activation_memory_budget"] = _LEAST_BUDGET
        patch["activation_memory_budget_solver"] = _RunAgain(constraints.recompute)
        patch["activation_memory_budget_runtime_estimator"] = "testing"  # unused: what runs again is decided
    if joint.subspaces:  # they stay between steps, as parameters do: a basis that both passes read is made of them again
        stay = joint.static.union(i for i, primal in enumerate(joint.primals) if primal in joint.subspaces)
        partition_kwargs = {**partition_kwargs, "static_lifetime_input_indices": sorted(stay)}
    _put_behind(GraphEditor(gm), joint.num_fwd_outputs)
    with _region_budget(gm, constraints, patch), functorch_config.patch(patch):
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **partition_kwargs)
    _take_from_behind(forward)
    seeds = tuple(n.name for n in (joint.seed, joint.learned_seed) if n is not None)
    saved = _saved(forward, joint.num_fwd_outputs, seeds)
    held = {s.name: s.holder for s in saved if not s.user_visible}
    inputs: dict[str, fx.Node] = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    tangents = [name for name, node in inputs.items() if is_tangent(node)]
    arrives = {name: held.get(name, name) for name in inputs if name in held or name in tangents}
    return PartitionedGraph(
        forward,
        backward,
        saved,
        kept_input_bytes=_kept_input_bytes(forward, joint),
        seeds=seeds,
        arrives=arrives,
        returned_bytes=sum(map(tensor_bytes, returned(forward, joint.num_fwd_outputs))),
        passed_bytes=_passed_bytes(backward, joint, arrives),
        tangent_bytes=sum(tensor_bytes(inputs[name]) for name in tangents),
    )


def _put_behind(editor: GraphEditor, num_fwd_outputs: int) -> None:
    """Let the first result of the forward need the gradients that are formed early with the loss
    (`actpass.passes.chunked_loss`), where they are no larger than the gradients of the logits that they are formed of. Upstream
    bans from the backward only what a result needs, and counts twice the bytes of what the backward only scales: it would save
    the gradients of all logits, and never free a piece of them. And the codes that are stored for weight gradients, which
    upstream would rather form in the backward where what they are of is rebuilt for free."""
    ends = [n for n in editor.graph.nodes if is_sum_in_place(n) and n.meta.get("recompute") == CheckpointPolicy.MUST_SAVE]
    held = [u for n in ends if _weighs_no_more(n) for u in n.users]
    held += [n for n in editor.graph.nodes if FOR_CODES in n.meta and n.meta.get("recompute") == CheckpointPolicy.MUST_SAVE]
    if not held:
        return
    outputs = output_values(editor.graph)
    first = next(i for i, o in enumerate(outputs[:num_fwd_outputs]) if isinstance(o, fx.Node) and o.op == "call_function")
    args, meta, last = (outputs[first], held), dict(outputs[first].meta), editor.graph.output_node().prev
    outputs[first] = editor.insert("call_function", torch.ops.actpass.behind.default, args, meta, after=last)
    set_output_values(editor.graph, outputs)


def _weighs_no_more(end: fx.Node) -> bool:
    return all(tensor_bytes(u) <= sum(map(tensor_bytes, products_of(end))) for u in end.users)


def _take_from_behind(forward: fx.GraphModule) -> None:
    for node in forward.graph.find_nodes(op="call_function", target=torch.ops.actpass.behind.default):
        node.replace_all_uses_with(node.args[0])
        forward.graph.erase_node(node)
        forward.recompile()


@contextmanager
def _region_budget(gm: fx.GraphModule, constraints: PartitionConstraints, patch: dict[str, Any]) -> Generator[None, None, None]:
    """While this lasts, a budget that the user's code gives (`torch.autograd.graph.region_activation_memory_budget`) stands in
    ``patch`` in place of the nodes' annotations: upstream asks that every node of the forward have one, those too that were
    inserted here, and takes it for more than what a plan says. Inductor's own cut reads them as they are, and checks them.

    Of a budget of 0 next to nothing is left where the forward writes to an input (`actpass.passes.save_written_inputs`):
    upstream would save the inputs and nothing else, and run the copies again."""
    clones = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    copies = any(n.meta.get("partitioner_tag") == "must_be_in_forward" for n in clones)
    if constraints == PartitionConstraints(recompute_materialized=False) and not copies:
        yield
        return
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]  # those of called functions are shared
    annotated = [n for graph in graphs for n in graph.nodes if REGION_BUDGET in n.meta.get("custom", ())]
    before = {n: n.meta["custom"] for n in annotated}
    for node, custom in before.items():
        patch.setdefault("activation_memory_budget", custom[REGION_BUDGET])
        node.meta["custom"] = {k: v for k, v in custom.items() if k != REGION_BUDGET}
    if copies and not patch.get("activation_memory_budget", functorch_config.activation_memory_budget):
        patch["activation_memory_budget"] = _LEAST_BUDGET
    try:
        yield
    finally:
        for node, custom in before.items():
            node.meta["custom"] = custom


def _run_once(joint: Joint, named: frozenset[str]) -> frozenset[str]:
    """The names of what the backward must not run again where something runs again. Of what is not free upstream bans its own
    list then, in which fused attention on a CPU, flex attention, grouped matmuls, sorts and scans are missing."""
    foreign = {n for n in joint.activations if _is_foreign(n)}
    nodes = joint.gm.graph.nodes
    return frozenset(n.name for n in nodes if _draws(n) or n in foreign or (n.name not in named and _is_expensive(joint, n)))


def run_again(cut: PartitionedGraph, joint: Joint) -> frozenset[str]:
    """The names of what is not free and runs in both graphs of ``cut``, but for what the user's own checkpointing decides."""
    forward, backward = ({n.name for n in gm.graph.nodes if n.op == "call_function"} for gm in (cut.forward, cut.backward))
    return frozenset(n.name for n in joint.gm.graph.nodes if n.name in forward & backward and _is_expensive(joint, n))


def _is_expensive(joint: Joint, node: fx.Node) -> bool:
    """Whether ``node`` is of the user's forward and not free to repeat, and no checkpointing of the user's decides on it.
    Collectives are upstream's matter."""
    own = node.meta.get("recompute") is None and OF_A_BASIS not in node.meta and node not in joint.backward
    if not own or is_free_to_repeat(node):
        return False
    return not isinstance(node.target, OpOverload) or bool(builtin_name(node)) or _is_foreign(node)


def _draws(node: fx.Node) -> bool:
    """Whether ``node`` takes from the random state: a seed, of which Inductor makes all numbers, or the numbers. Where
    something runs again upstream would draw another seed in the backward: it knows eager mode's operators alone as random."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and isinstance(node.meta.get("val"), torch.Tensor)


def _is_foreign(node: fx.Node) -> bool:
    """Whether ``node`` is an operator that is not torch's own: what it costs and whether a second run gives the same is not
    known. Where something runs again upstream would run all of them again."""
    target: Any = node.target
    return isinstance(target, OpOverload) and not builtin_name(node) and not target.namespace.startswith("_c10d")


def _recompute_from_parameters(joint: Joint) -> None:
    """Let the backward cast parameters again, and dequantise what is stored as codes. Under autocast every weight's
    half-precision copy would be saved, and a frozen weight in few bits would be saved as it was dequantised: upstream repeats
    no concatenation, which puts the codes of one byte side by side. Both are made of tensors that stay."""
    casts, made, coded = set(joint.parameter_path), set[fx.Node](), set[fx.Node]()
    changing = joint.activations | joint.backward | set(joint.state)
    for node in joint.gm.graph.nodes:
        if node.op == "output" or node in changing or node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
            continue
        sources = node.all_input_nodes
        if node.op != "call_function" or (all(a in made for a in sources) and _is_a_loop(node)):
            made.add(node)  # by loops, of what stays
            if any(a in coded for a in sources) or (node.op != "call_function" and _may_hold_codes(node)):
                coded.add(node)
        if sources and (is_cast(node) or is_view(node)) and all(a in casts for a in sources):
            casts.add(node)
    dequantised = coded | (made & ancestors(coded))
    for node in {n for n in casts if is_cast(n)} | dequantised:
        if node.op == "call_function" and node.meta.get("recompute") is None:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _may_hold_codes(node: fx.Node) -> bool:
    """Whether it holds integers, but none of 64 bits: those are positions and types."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dtype.is_floating_point or val.dtype.is_complex:
        return False
    return val.dtype not in (torch.bool, torch.int64)


def _is_a_loop(node: fx.Node) -> bool:
    """Whether ``node`` is a loop that gives the same again."""
    row = rule_of(node)
    loop = is_pointwise(node) or row.moves is not None or row.realised == "loop"
    return loop and not _draws(node) and not _is_foreign(node)


def _release_what_layers_share(joint: Joint) -> None:
    """Leave to the min-cut what one of a user's checkpoints makes without a parameter, and others read: the mask of all layers,
    once equal values are merged. Upstream would save it; it makes it again for free."""
    kept = descendants([*joint.parameter_path, *joint.computed_inputs]) | joint.backward
    for node in joint.gm.graph.nodes:
        own = node.meta.get("ac_graph_id")
        if own is None or node in kept or node.meta.get("recompute") != CheckpointPolicy.PREFER_RECOMPUTE:
            continue
        shared = any(u.meta.get("ac_graph_id", own) != own for u in node.users)
        if shared and (rule_of(node).recomputable or is_view(node)) and not _draws(node):
            node.meta = {k: v for k, v in node.meta.items() if k not in ("recompute", "ac_graph_id")}


def _saved(forward: fx.GraphModule, num_fwd_outputs: int, seeds: Sequence[str]) -> tuple[Saved, ...]:
    outputs = output_values(forward.graph)
    visible = {storage_root(o) for o in outputs[:num_fwd_outputs] if isinstance(o, fx.Node)}
    counted: set[fx.Node] = set()
    saved: list[Saved] = []
    for node in outputs[num_fwd_outputs:]:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        root = storage_root(node)
        if root.op in ("placeholder", "get_attr") and root.name not in seeds:
            continue
        holder = root if _shows_all(node, root) or _is_realised(root) else node
        nbytes = 0 if holder in counted else tensor_bytes(holder)
        counted.add(holder)
        saved.append(Saved(node.name, root.name, holder.name, nbytes, root in visible))
    return tuple(saved)


def _shows_all(node: fx.Node, root: fx.Node) -> bool:
    return tensor_bytes(node) >= tensor_bytes(root)


def _is_realised(root: fx.Node) -> bool:
    """Whether a part of ``root`` keeps all of it alive: a library kernel wrote it in one buffer. A part of anything else is
    computed by Inductor on its own."""
    return is_matmul(root) or root.target is operator.getitem or is_attention(root)


def returned(forward: fx.GraphModule, outputs: int) -> set[fx.Node]:
    """The storages that are made for the first ``outputs`` results of ``forward``, which the caller gets."""
    roots = {storage_root(o) for o in output_values(forward.graph)[:outputs] if isinstance(o, fx.Node)}
    return {r for r in roots if r.op == "call_function"}


def _passed_bytes(backward: fx.GraphModule, joint: Joint, arrives: Mapping[str, str]) -> int:
    pairs = zip(joint.primals, output_values(backward.graph), strict=False)
    roots = {p: storage_root(o) for p, o in pairs if isinstance(o, fx.Node)}
    stay = {r for p, r in roots.items() if p not in joint.computed_inputs}
    passed = {r for r in roots.values() if r.op == "call_function" or r.name in arrives} - stay
    return sum(tensor_bytes(r) for r in passed)


def _kept_input_bytes(forward: fx.GraphModule, joint: Joint) -> int:
    outputs = output_values(forward.graph)
    names = {storage_root(n).name for n in outputs[joint.num_fwd_outputs :] if isinstance(n, fx.Node)}
    return sum(tensor_bytes(n) for n in joint.computed_inputs if n.name in names)

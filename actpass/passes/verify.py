"""Checks after every rewrite and every cut. What must hold whatever the graph raises `AssertionError`: a bug of ours. Where
upstream's partitioner chose otherwise than the plan, it is `GraphUnsupported`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from actpass.analysis.partitioned import Cut
from actpass.codecs import LEARNED
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import Joint
from actpass.ir.traversal import ancestors
from actpass.passes.project_weight_gradients import Rewritten
from actpass.plan import Plan, SavedTensor, Storage

_SLACK, _SLACK_BYTES = 0.05, 16384
"""What may cross beyond the exact cut where the forward also takes sketches: a mask in place of the bits that it is made of."""


def only_planned_gradients_changed(joint: Joint, plan: Plan, done: Rewritten) -> None:
    """Forward outputs but the sketches, input gradients and the gradients of unplanned parameters read no inserted node."""
    planned = {path for d in plan.projections for path in d.parameters}
    free = [g for primal, g in joint.gradients if joint.parameter_path.get(primal) not in planned]
    touched = done.inserted & ancestors([*(o for o in joint.forward_outputs if o not in done.sketches), *free])
    if touched:
        raise AssertionError(f"the rewrite reached a value that it must not change, through {min(touched)}")


def crosses_as_planned(rewritten_cut: Cut, exact_cut: Cut, plan: Plan, done: Rewritten, roots: dict[str, str]) -> None:
    """Of every projected site exactly what the plan says crosses.

    ``project_in="forward"``: z crosses and x does not. ``"backward"``: z does not cross. And together no more bytes cross
    than in the exact cut, but for the bases and the seed. roots: site -> the node that allocated its storage.
    """
    crossing = {s.name for s in rewritten_cut.saved} | rewritten_cut.roots
    for d in plan.contracted:
        z, x = done.payloads[d], roots[d.site]
        if d.project_in == "backward" and z in crossing:
            raise GraphUnsupported(f"the payload of {d.site} crosses, but the plan projects it in the backward")
        if d.project_in == "forward" and (x in crossing or z not in crossing):
            raise GraphUnsupported(
                f"the plan stores the payload of {d.site}, but {'x' if x in crossing else 'nothing'} crosses"
            )
    payloads = set(done.payloads.values())
    names = {n.name for n in done.inserted}
    state = sum(s.nbytes for s in rewritten_cut.saved if s.root in names - payloads or s.root in rewritten_cut.seeds)
    learned = any(d.method in LEARNED for d in plan.projections)
    slack = max(_SLACK * exact_cut.saved_bytes, _SLACK_BYTES) if learned else 0  # sketches move upstream's choices a little
    if rewritten_cut.saved_bytes - state > exact_cut.saved_bytes + slack:
        raise GraphUnsupported(
            f"{rewritten_cut.saved_bytes} bytes cross, more than the {exact_cut.saved_bytes} of the exact cut"
        )


def decoded_as_planned(cut: Cut, decoded: Cut, tensors: Sequence[SavedTensor], done: Rewritten, num_fwd_outputs: int) -> None:
    """The forward's own outputs but the sketches are the same nodes and read no inserted one; of ``tensors`` none crosses, and
    each one's projection does."""
    now, was = (_outputs(c.forward)[:num_fwd_outputs] for c in (decoded, cut))
    own = [(new, old) for new, old in zip(now, was, strict=True) if new not in done.sketches]
    touched = done.inserted & ancestors(new for new, _ in own if isinstance(new, fx.Node))
    if touched or any(str(new) != str(old) for new, old in own):
        raise AssertionError("the projections reached an output of the forward")
    crossing = {s.holder for s in decoded.saved} | {s.name for s in decoded.saved}
    left = [t.node for t in tensors if t.node in crossing or crossing & set(t.crossing)]
    if left or not set(done.payloads.values()) <= crossing:
        raise GraphUnsupported(f"{left[0] if left else 'nothing'} crosses, where a projection should")


def stored_as_planned(
    cut: Cut, swapped: Cut, storages: tuple[Storage, ...], inserted: set[fx.Node], num_fwd_outputs: int
) -> None:
    """The forward's own outputs read no inserted node and are the same nodes; no coded memory crosses as it was; and what
    crosses has the bytes that the plan says."""
    outputs, was = (_outputs(c.forward)[:num_fwd_outputs] for c in (swapped, cut))
    touched = inserted & ancestors(n for n in outputs if isinstance(n, fx.Node))
    if touched or [str(n) for n in outputs] != [str(n) for n in was]:
        raise AssertionError("the low-bit forms reached an output of the forward")
    coded = {s.root for s in storages if s.coded}
    left = {s.root for s in storages if not s.coded}
    both = {s.root for s in swapped.saved} & (coded - left)
    if both:
        raise AssertionError(f"{min(both)} still crosses, beside its codes")
    planned = sum(s.stored_bytes for s in storages) + sum(s.nbytes for s in cut.saved if s.root in cut.seeds)
    if swapped.saved_bytes != planned:
        raise AssertionError(f"{swapped.saved_bytes} bytes cross, not the {planned} that the plan says")


def _outputs(gm: fx.GraphModule) -> list[object]:
    (out,) = gm.graph.find_nodes(op="output")
    return list(out.args[0])

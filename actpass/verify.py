"""Checks after every rewrite and every cut. A violation is a bug of ours: the region falls back to Inductor's own cut."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from actpass.errors import GraphUnsupported
from actpass.graph import Joint
from actpass.partition import Cut
from actpass.plan import Plan
from actpass.rewrite import Rewritten


def only_planned_gradients_changed(joint: Joint, plan: Plan, done: Rewritten) -> None:
    """Forward outputs, input gradients and the gradients of unplanned parameters read no inserted node."""
    planned = {path for d in plan.projections for path in d.parameters}
    free = [g for primal, g in joint.gradients if joint.parameter_path.get(primal) not in planned]
    touched = done.inserted & _ancestors([*joint.forward_outputs, *free])
    if touched:
        raise GraphUnsupported(f"the rewrite reached a value that it must not change, through {min(touched)}")


def crosses_as_planned(rewritten_cut: Cut, exact_cut: Cut, plan: Plan, done: Rewritten, roots: dict[str, str]) -> None:
    """Of every projected site exactly what the plan says crosses.

    ``project_in="forward"``: z crosses and x does not. ``"backward"``: z does not cross. And together no more bytes cross
    than in the exact cut, but for the bases and the seed. roots: site -> the node that allocated its storage.
    """
    crossing = {s.name for s in rewritten_cut.saved} | rewritten_cut.roots
    for d in plan.projections:
        z, x = done.payloads[d], roots[d.site]
        if d.project_in == "backward" and z in crossing:
            raise GraphUnsupported(f"the payload of {d.site} crosses, but the plan projects it in the backward")
        if d.project_in == "forward" and (x in crossing or z not in crossing):
            raise GraphUnsupported(
                f"the plan stores the payload of {d.site}, but {'x' if x in crossing else 'nothing'} crosses"
            )
    payloads = set(done.payloads.values())
    names = {n.name for n in done.inserted}
    state = sum(s.nbytes for s in rewritten_cut.saved if s.root in names - payloads or s.root == rewritten_cut.seed)
    if rewritten_cut.saved_bytes - state > exact_cut.saved_bytes:
        raise GraphUnsupported(
            f"{rewritten_cut.saved_bytes} bytes cross, more than the {exact_cut.saved_bytes} of the exact cut"
        )


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen

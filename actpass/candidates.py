"""Weight-gradient contractions -> candidates: tensors whose projection could be stored, or contracted, in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import fx

from actpass.graph import Contraction, Finding, Joint, classify_uses
from actpass.graph.joint import storage_root, value
from actpass.partition import Cut
from actpass.plan import Candidate


def find_candidates(
    joint: Joint, finding: Finding, exact: Cut, treatment_of: Callable[[Contraction], Hashable]
) -> list[Candidate]:
    """Group the contractions by the tensor they read, the side they read it from, and the treatment they get. exact: the cut
    that says what is stored, with every contraction as it is."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    groups: dict[Any, list[Contraction]] = {}
    for c in finding.contractions:
        groups.setdefault((c.x, c.left, c.width, treatment_of(c)), []).append(c)
    names = [c.node for c in finding.contractions]
    return [_candidate(nodes[members[0].x], members, exact, names) for members in groups.values()]


def _candidate(x: fx.Node, members: list[Contraction], exact: Cut, contractions: list[str]) -> Candidate:
    first, root = members[0], storage_root(x)
    return Candidate(
        name=x.name,
        matmuls=tuple(c.node for c in members),
        parameters=tuple(p for c in members for p in c.parameters),
        groups=first.groups,
        tokens=first.tokens,
        width=first.width,
        outs=tuple(c.out for c in members),
        root=root.name,
        x_bytes=sum(s.nbytes for s in exact.saved if s.root == root.name),
        element_size=value(x).element_size(),
        rank_multiple=max(c.rank_multiple for c in members),
        frees=_only_contracted(exact, root.name, contractions),
    )


def _only_contracted(exact: Cut, root: str, contractions: list[str]) -> bool:
    """Whether the exact cut saves the storage of ``root`` for weight gradients and nothing else."""
    crossing = [s for s in exact.saved if s.root == root]
    if not crossing or any(s.user_visible for s in crossing):
        return False
    placeholders = {n.name: n for n in exact.backward.graph.find_nodes(op="placeholder")}
    uses = [use for s in crossing for use in classify_uses(placeholders[s.name], contractions)[0]]
    return bool(uses) and all(use.kind == "contraction" for use in uses)

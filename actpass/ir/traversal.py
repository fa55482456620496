"""What is reached in a graph from some of its nodes, they among it, the output node never."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx


def descendants(start: Iterable[fx.Node]) -> set[fx.Node]:
    """What is computed from ``start``."""
    return reach(start, lambda n: n.users)


def ancestors(start: Iterable[fx.Node]) -> set[fx.Node]:
    """What ``start`` is computed from."""
    return reach(start, lambda n: n.all_input_nodes)


def reach(start: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached = set(start)
    todo = list(reached)
    while todo:
        new = [n for n in neighbours(todo.pop()) if n not in reached and n.op != "output"]
        reached.update(new)
        todo.extend(new)
    return reached

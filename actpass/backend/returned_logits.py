"""Take the logits that a loss is formed from out of what a graph returns.

Dynamo's graph before, and the clone that is compiled in its place::

    h = ...; logits = h @ W; loss = f(logits); return loss, logits
    h = ...; logits = h @ W; loss = f(logits); return loss, h          (and outside of it: logits = way(h, W), deferred)

The hidden state h is found on the graph: the last tensor that everything computed on the way to the logits goes through, apart
from what derives from the graph's inputs alone, and that is much smaller than they are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import GraphInputs, example_of, is_written, operator_name, storage_of
from actpass.ir.traversal import ancestors, descendants
from actpass.passes.loss_region import LEAST_SHARE
from actpass.runtime.deferred_logits import Layouts, TracedWay, Way, layouts_of
from actpass.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    gathered,
    is_data_dependent,
    returns_to_a_graph_break,
    size_hint,
)

_LEAST_RATIO = 2
"""Of logits to their hidden state, in elements: the chunked loss asks for more than this of their widths."""
_MOST_MATMULS = 3
"""On the way: a head, and two of an adapter."""
_SAVED_AT_LEAST = 0.2
"""Of the bytes of all tensors of Dynamo's graph, what Inductor's default saves (of a Llama's layer some 0.4): where the logits
do not weigh beside that, the graph need not be traced to know it."""
_MATMULS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "tensordot", "dot", "mv", "bilinear"}
_MODES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled"}


@dataclass(frozen=True)
class Taken:
    """gm: a clone of Dynamo's graph that returns hidden states in place of logits. outputs: where each of the graph's results
    is among those of the clone, or the way to it."""

    gm: fx.GraphModule
    outputs: tuple[int | Way, ...]


def take_logits(gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: GraphInputs) -> Taken | None:
    """``gm`` without the logits that it returns and forms a loss from; None if it returns none. Raises `GraphUnsupported` with
    the reason if they can't be deferred."""
    results: Any = gm.graph.output_node().args[0]
    reader = _Reader(gm, example_inputs, inputs)
    outputs: list[int | Way] = []
    returned: list[Any] = []

    def position(result: Any) -> int:
        if result not in returned:
            returned.append(result)
        return returned.index(result)

    for result in results:
        found = reader.find(result)
        if found is None:
            outputs.append(position(result))
            continue
        reader.check(found)
        outputs.append(reader.way(found, None if found.hidden is None else position(found.hidden)))
    if not any(isinstance(o, Way) for o in outputs):
        return None
    return Taken(_returning(gm, returned), tuple(outputs))


def _returning(gm: fx.GraphModule, returned: Sequence[fx.Node]) -> fx.GraphModule:
    """A clone of Dynamo's graph ``gm`` with other results."""
    clone, mapping = copy_module(gm)
    clone.graph.output_node().args = (tuple(fx.map_arg(list(returned), lambda n: mapping[n])),)
    clone.recompile()
    return clone


@dataclass(frozen=True)
class _Found:
    """Logits among a graph's results. hidden: what they are made of; None: only inputs. leaves: the inputs that are read on the
    way. chain: what runs on it, in order."""

    logits: fx.Node
    hidden: fx.Node | None
    leaves: tuple[fx.Node, ...]
    chain: tuple[fx.Node, ...]

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        return self.leaves if self.hidden is None else (self.hidden, *self.leaves)


class _Reader:
    """Reads one of Dynamo's graphs."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: GraphInputs) -> None:
        self.gm = gm
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.placeholders: list[fx.Node] = gm.graph.find_nodes(op="placeholder")
        self.examples = dict(zip(self.placeholders, example_inputs, strict=True))
        self.passed = {n for n, computed in zip(self.placeholders, inputs.computed, strict=True) if computed}
        data = {n for n, path in zip(self.placeholders, inputs.paths, strict=True) if path is None}
        self.computed = descendants(data) - data
        losses = {n for n in gm.graph.output_node().all_input_nodes if _is_loss(n)}
        self.of_losses = ancestors(losses)

    # ------------------------------------------------------------------------------------------------------------ finding

    def find(self, result: Any) -> _Found | None:
        """The way to ``result``, if it is logits that a loss is formed from: no matmul reads what is made of them."""
        if not isinstance(result, fx.Node) or not _is_wide(result):
            return None
        hidden, chain = self._last_before(result)
        if hidden is None and not any(a in self.passed for n in chain for a in n.all_input_nodes):
            return None
        if not 1 <= sum(map(_is_matmul, chain)) <= _MOST_MATMULS or not chain & self.of_losses:
            return None
        if any(_is_matmul(n) or _is_function(n) for n in descendants(chain) - chain):
            return None
        weights = {n for n in ancestors(chain) - ancestors({hidden} if hidden is not None else set()) if n not in self.computed}
        nodes = sorted((chain | weights) - set(self.placeholders), key=self.order.__getitem__)
        read = {a for n in nodes for a in n.all_input_nodes}
        return _Found(result, hidden, tuple(n for n in self.placeholders if n in read), tuple(nodes))

    def _last_before(self, result: fx.Node) -> tuple[fx.Node | None, set[fx.Node]]:
        """The last computed tensor that all of the way to ``result`` goes through, and what lies between them. It is not looked
        for behind more matmuls than a way may have."""
        chain: set[fx.Node] = set()
        open_ = {result} & self.computed
        matmuls = 0
        while open_ and matmuls <= _MOST_MATMULS:
            last = max(open_, key=self.order.__getitem__)
            if open_ == {last} and last is not result and _is_smaller(last, result) and not self._is_view(last):
                return last, chain
            chain.add(last)
            matmuls += _is_matmul(last)
            open_ = (open_ - {last}) | {a for a in last.all_input_nodes if a in self.computed}
        return None, chain

    def _is_view(self, node: fx.Node) -> bool:
        """Whether it shows the memory of what it is made of. What Dynamo's graph returns must not: it would be made again."""
        storage = storage_of(node)
        return storage is not None and any(storage_of(a) == storage for a in node.all_input_nodes)

    # ----------------------------------------------------------------------------------------------------------- checking

    def check(self, found: _Found) -> None:
        """Raise `GraphUnsupported` if the logits can't be computed later."""
        if returns_to_a_graph_break(self.gm):
            raise GraphUnsupported("a graph break follows, and what is behind it is given whole tensors")
        if any(id(self.examples[n]) in gathered() for n in found.leaves):
            raise GraphUnsupported("FSDP2 frees the head's weights behind the forward, and they could not be computed later")
        if len(self.passed.intersection(found.leaves)) > (found.hidden is None):
            raise GraphUnsupported("weights that they are made of were computed elsewhere, as FSDP does")
        made = {storage_of(n): _nbytes(n) for n in self.gm.graph.nodes if n not in self.examples}
        if LEAST_SHARE * _nbytes(found.logits) < _SAVED_AT_LEAST * sum(made.values()):
            raise GraphUnsupported("they do not weigh beside what else is saved")
        for node in found.leaves:
            kind = cast(type[Any], type(self.examples[node]))
            if kind not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
                raise GraphUnsupported(f"{node.name}, which they are made of, is a {kind.__name__}")
        around = [n for n in (*found.sources, *found.chain) if example_of(n) is not None]
        if any(is_data_dependent(size) for n in around for size in _made(n).shape):
            raise GraphUnsupported("their shape depends on data")
        shown = {storage_of(n) for n in around}
        written = [n for n in self.gm.graph.nodes if storage_of(n) in shown and is_written(n)]
        if written:
            raise GraphUnsupported(f"{written[0].name}, which they are made of or which shows them, is written in place")
        if any(_is_function(n) or n.op == "call_module" for n in found.chain):
            raise GraphUnsupported("a function that is no operator lies between them and the hidden state")

    # ------------------------------------------------------------------------------------------------------------ tracing

    def way(self, found: _Found, position: int | None) -> Way:
        """What was found, as functions of tensors. position: of the hidden state in the clone's results."""
        positions = {n: i for i, n in enumerate(self.placeholders)}
        sources = [_Source(_made(n).dtype, _made(n).device, self._wants_gradient(n)) for n in found.sources]
        autocast = _autocast_on(sources[0].device.type)
        at = partial(_traced_way, self._function(found), sources, _made(found.logits).requires_grad, autocast)
        layouts = layouts_of([_made(n) for n in found.sources])
        way = at(layouts)
        random = [n for n in way.forward.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
        if random:
            raise GraphUnsupported(f"{random[0].target} on the way to them draws random numbers")
        if way.differentiated:
            _ = way.backward  # traced now: what can't be differentiated is said now
        return Way(position, tuple(positions[n] for n in found.leaves), at, {layouts: way})

    def _wants_gradient(self, node: fx.Node) -> bool:
        return _made(node).requires_grad if node not in self.examples else bool(self.examples[node].requires_grad)

    def _function(self, found: _Found) -> fx.GraphModule:
        """The chain as a function of its sources, within the modes (autocast, no_grad) that it ran in."""
        graph, env, chain = fx.Graph(), dict[fx.Node, fx.Node](), set(found.chain)
        for i, node in enumerate(found.sources):
            env[node] = graph.placeholder(f"source_{i}")
        for node in self.gm.graph.nodes:
            if node in chain or getattr(node.target, "__name__", "") in _MODES:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(env[found.logits])
        return fx.GraphModule(self.gm, graph)


_Autocast = tuple[bool, torch.dtype]
"""Whether it is on, and to which dtype."""


def _autocast_on(device_type: str) -> _Autocast | None:
    """As Dynamo's guards hold it for each call. None for a kind of device that has none, as meta."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def _autocast_as(found: _Autocast | None, device_type: str) -> AbstractContextManager[Any]:
    if found is None:
        return nullcontext()
    enabled, to = found
    return torch.autocast(device_type, to, enabled, cache_enabled=False)


@dataclass(frozen=True)
class _Source:
    """What logits are made of, whatever its shape."""

    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def of(self, layout: tuple[Sequence[int], Sequence[int]]) -> torch.Tensor:
        return torch.empty_strided(*layout, dtype=self.dtype, device=self.device).requires_grad_(self.requires_grad)


def _traced_way(
    function: fx.GraphModule, sources: Sequence[_Source], differentiated: bool, autocast: _Autocast | None, layouts: Layouts
) -> TracedWay:
    """``function`` of ``sources`` of these shapes, and its gradients if they are wanted, under the ``autocast`` around the
    region: whoever reads them may be outside of it."""

    @contextmanager
    def traced() -> Generator[None, None, None]:
        with _fake_values(), _autocast_as(autocast, sources[0].device.type):
            yield

    def fakes() -> list[torch.Tensor]:
        return [source.of(layout) for source, layout in zip(sources, layouts, strict=True)]

    def trace_forward() -> fx.GraphModule:
        with traced(), torch.no_grad():
            return _tidy(make_fx(function)(*fakes()))

    def trace_backward() -> fx.GraphModule:
        with traced():
            return _tidy(
                make_fx(partial(_pull, function))(torch.empty_strided(shape, strides, dtype=dtype, device=device), *fakes())
            )

    with traced(), torch.no_grad():
        logits = function(*fakes())
    shape, strides, dtype, device = tuple(logits.shape), logits.stride(), logits.dtype, logits.device
    return TracedWay(shape, strides, dtype, differentiated, trace_forward, trace_backward)


@contextmanager
def _fake_values() -> Generator[None, None, None]:
    """In a mode of its own: Dynamo's values are of several by now. And without the hooks of a checkpoint around the region."""
    with torch.autograd.graph.saved_tensors_hooks(_same, _same), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _pull(function: fx.GraphModule, gradient: torch.Tensor, *sources: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of those ``sources`` that want one. What of the forward they do not need is dead code in what is traced."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in sources]
    wanted = [x for x in leaves if x.requires_grad]
    with torch.enable_grad():
        made = function(*leaves)
    found = iter(torch.autograd.grad(made, wanted, gradient, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _tidy(gm: fx.GraphModule) -> fx.GraphModule:
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _made(node: fx.Node) -> torch.Tensor:
    made = example_of(node)
    if made is None:
        raise GraphUnsupported(f"{node.name} on the way to them is no tensor")
    return made


def _nbytes(node: fx.Node) -> int:
    made = example_of(node)
    return size_hint(made.numel()) * made.element_size() if made is not None else 0


def _is_loss(node: fx.Node) -> bool:
    made = example_of(node)
    return made is not None and made.dim() < 2 and made.numel() == 1 and made.is_floating_point() and made.requires_grad


def _is_wide(node: fx.Node) -> bool:
    made = example_of(node)
    return made is not None and made.dim() > 1 and made.is_floating_point()


def _is_smaller(node: fx.Node, logits: fx.Node) -> bool:
    made = example_of(node)
    return (
        made is not None
        and made.is_floating_point()
        and _LEAST_RATIO * size_hint(made.numel()) < size_hint(_made(logits).numel())
    )


def _is_matmul(node: fx.Node) -> bool:
    name = operator_name(node)
    return node.op != "placeholder" and (name in _MATMULS or "attention" in name)


def _is_function(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)

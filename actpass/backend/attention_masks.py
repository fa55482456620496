"""Leave out attention masks that only say what ``is_causal=True`` says.

Models of transformers hand attention a mask of queries x keys whenever they are compiled, also where each query may just see
the keys up to its own: the choice to do without depends on values, and Dynamo traces no values. Such a mask takes the square of
the sequence's length, rules out flash attention on a GPU, and makes attention do twice the work. Dynamo's graph, before::

    mask = (key <= query) & (document[key] == document[query]); out = attention(q, repeat(k), repeat(v), attn_mask=mask)

and the clone that is compiled in its place, if the mask allows just that (`actpass.analysis.allowed_keys`)::

    out = attention(q, k, v, is_causal=True, enable_gqa=True)

That is what the same model calls in eager mode. Where a mask is made of inputs of the graph (an ``attention_mask``, positions,
a length that may change), Dynamo is given a guard that reads the mask again from the inputs of each call: where it allows
something else, Dynamo compiles the graph with its mask, and keeps both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.analysis.allowed_keys import Allowed, MaskReader, allowed
from actpass.ir.called_graphs import add_module, checkpoint_calls
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import example_of, is_written, operator_name, source_name
from actpass.ir.traversal import ancestors
from actpass.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    can_be_guarded,
    guard_each_call,
    size_hint,
)

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MOST_HEAD_FEATURES = 256
"""With which fused kernels take fewer heads of keys than of queries: where transformers lets them, too."""

_MOST_GIVEN = 2**20
"""Elements of an input that masks are made of: its last values are kept, and compared at each call."""
_MOST_LAYOUTS = 64
"""For which the operators that make masks are kept. Others are traced again."""

Kind = Literal["causal", "all"]
"""What a mask comes to: ``is_causal=True``, or no mask."""


def infer_masks(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, guarded: bool = True
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A clone of Dynamo's ``gm`` without the masks that attention can do without, and notes on all masks. ``gm`` itself stays
    as it is, and is returned where none is left out. guarded: whether calls with other values may follow: Dynamo then checks
    each. Otherwise it is right for ``example_inputs``."""
    attentions = list(_attentions(gm, None))
    masks = list(dict.fromkeys(a.mask for a in attentions))
    if not masks:
        return gm, ()
    examples = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    unread = {mask: reason for mask in masks if (reason := _why_unread(mask, examples, guarded)) is not None}
    read = [mask for mask in masks if mask not in unread]
    made = _MaskGraph.of(gm, read)
    given = [examples[leaf] for leaf in made.leaves]
    try:
        found = dict(zip(read, made.read(given), strict=True))
    except Exception as error:  # whatever a user's operators raise where they run by themselves
        reason = f"it can't be read by itself: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return gm, tuple(_note(mask, attentions, None, None, unread.get(mask, reason), ()) for mask in masks)
    if made.leaves and guarded:
        guard_each_call(made.leaves, _SameKinds(made, [_kind(found[mask]) for mask in read]))
    kinds: dict[fx.Node, Kind] = {mask: kind for mask in read if (kind := _kind(found[mask])) is not None}
    notes = [_note(mask, attentions, kinds.get(mask), found.get(mask), unread.get(mask), made.leaves) for mask in masks]
    return (_without(gm, kinds) if kinds else gm), tuple(notes)


# ------------------------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class _Attention:
    """A call of attention with a mask: ``node``, in the graph or in one that it calls. mask: a node of the graph itself."""

    node: fx.Node
    mask: fx.Node


def _attentions(gm: fx.GraphModule, outside: Mapping[fx.Node, fx.Node] | None) -> Iterator[_Attention]:
    """Those of ``gm`` and of the checkpoints that it calls. outside: what a checkpoint's placeholders are given; None for the
    graph itself."""
    for node in gm.graph.nodes:
        mask = _argument(node, "attn_mask") if node.target is _ATTENTION else None
        if isinstance(mask, fx.Node):
            mask = mask if outside is None else outside.get(mask)
            if mask is not None:
                yield _Attention(node, mask)
        for body, given in checkpoint_calls(gm, node):
            known = given if outside is None else {p: outside[g] for p, g in given.items() if g in outside}
            yield from _attentions(body, known)


def _argument(node: fx.Node, name: str) -> Any:
    position = _ARGUMENTS.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _why_unread(mask: fx.Node, examples: Mapping[fx.Node, Any], guarded: bool) -> str | None:
    """Why what ``mask`` is made of can't be run by itself, or None."""
    if mask in examples:
        return "it is an input"
    made_of = ancestors([mask])
    for node in made_of:
        reason = _why_not_given(node, examples[node], guarded) if node in examples else None
        if reason is not None:
            return reason
        if isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
            return f"{node.name}, of which it is made, is no plain function of tensors"
    written = [node for node in made_of if is_written(node)]
    return f"{written[0].name}, of which it is made, is written in place" if written else None


def _why_not_given(node: fx.Node, example: Any, guarded: bool) -> str | None:
    """Why the value of an input can't be read now, or not again at each call."""
    if isinstance(example, torch.Tensor):
        if example.requires_grad:
            return f"it is made of {node.name}, which is trained"
        if isinstance(example, FakeTensor) or example.device.type == "meta":
            return f"the values of {node.name}, of which it is made, are not known when this is compiled"
        if example.numel() > _MOST_GIVEN:
            return f"{node.name}, of which it is made, is too large to be compared at each call"
    if guarded and not can_be_guarded(node):
        return f"Dynamo can't check {node.name}, of which it is made, at each call"
    return None


# ------------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, eq=False)
class _MaskGraph:
    """The part of Dynamo's graph that makes masks, as a function of those ``leaves`` of the graph that it reads. readers: for
    leaves of these shapes and dtypes, or sizes."""

    function: fx.GraphModule
    leaves: tuple[fx.Node, ...]
    readers: dict[tuple[Any, ...], MaskReader] = field(default_factory=dict[tuple[Any, ...], MaskReader])

    @classmethod
    def of(cls, gm: fx.GraphModule, masks: Sequence[fx.Node]) -> _MaskGraph:
        graph, env, wanted = fx.Graph(), dict[fx.Node, fx.Node](), ancestors(masks)
        leaves = tuple(n for n in gm.graph.find_nodes(op="placeholder") if n in wanted)
        for leaf in leaves:
            env[leaf] = graph.placeholder(leaf.name)
        for node in gm.graph.nodes:
            if node in wanted and node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output([env[mask] for mask in masks])
        return cls(fx.GraphModule(gm, graph), leaves)

    def read(self, values: Sequence[Any]) -> list[Allowed | None]:
        """What each of the masks allows, given the ``values`` of the leaves."""
        real: list[Any] = [v.detach() if isinstance(v, torch.Tensor) else size_hint(v) for v in values]
        layouts: tuple[Any, ...] = tuple((v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else v for v in real)
        reader = self.readers.get(layouts)
        if reader is None:
            if len(self.readers) == _MOST_LAYOUTS:
                del self.readers[next(iter(self.readers))]
            reader = self.readers[layouts] = self._reader(layouts)
        with torch.no_grad():
            masks: Sequence[Any] = cast(Any, reader).run(*real)
            reader.env.clear()  # what came out
            return [allowed(mask) for mask in masks]

    def _reader(self, layouts: tuple[Any, ...]) -> MaskReader:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            fakes = [_fake(*cast(Any, x)) if isinstance(x, tuple) else x for x in layouts]
            return MaskReader(make_fx(self.function)(*fakes))


def _fake(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class _SameKinds:
    """Whether masks come to what they came to when the graph was compiled. The last values are remembered: most steps have the
    same."""

    def __init__(self, masks: _MaskGraph, kinds: Sequence[Kind | None]) -> None:
        self.masks, self.kinds = masks, list(kinds)
        self.last: tuple[list[Any], bool] | None = None

    def __call__(self, *values: Any) -> bool:
        if self.last is None or not all(map(_is_equal, values, self.last[0])):
            try:
                same = [_kind(a) for a in self.masks.read(values)] == self.kinds
            except Exception:  # of these values, or sizes, they can't be read: none of them may be left out
                same = not any(self.kinds)
            self.last = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values], same
        return self.last[1]


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return bool(a == b)


def _kind(found: Allowed | None) -> Kind | None:
    if found is None:
        return None
    return "all" if found.is_all else "causal" if found.is_causal else None


# ---------------------------------------------------------------------------------------------------------------- rewriting


def _without(gm: fx.GraphModule, kinds: Mapping[fx.Node, Kind]) -> fx.GraphModule:
    """A clone of ``gm`` whose attentions are told the ``kinds`` of their masks."""
    clone, mapping = copy_module(gm)
    known: dict[fx.Node, Kind] = {mapping[mask]: kind for mask, kind in kinds.items()}
    for node in list(clone.graph.nodes):
        kind = known.get(_argument(node, "attn_mask")) if node.target is _ATTENTION else None
        if kind is not None:
            _leave_out_mask(node, kind)
        for body, given in checkpoint_calls(clone, node):
            inside: dict[fx.Node, Kind] = {p: known[g] for p, g in given.items() if g in known}
            if inside:
                _replace_body(clone, node, body, _without(body, inside))
    made_of = ancestors(known)
    for node in reversed(list(clone.graph.nodes)):
        if node in made_of and node.op != "placeholder" and not node.users:  # what masks are made of has no effects
            clone.graph.erase_node(node)
    clone.recompile()
    return clone


def _replace_body(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, new: fx.GraphModule) -> None:
    for attribute in call.all_input_nodes:
        if attribute.op == "get_attr" and getattr(gm, str(attribute.target)) is body:
            with gm.graph.inserting_before(call):
                call.replace_input_with(attribute, gm.graph.get_attr(add_module(gm, new)))


def _leave_out_mask(node: fx.Node, kind: Kind) -> None:
    given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    given |= {"attn_mask": None, "is_causal": kind == "causal"}
    key, value = _unrepeated(given["key"]), _unrepeated(given["value"])
    if key is not None and value is not None and _takes_grouped_heads(_shape(given["query"]), _shape(key), _shape(value)):
        given |= {"key": key, "value": value, "enable_gqa": True}
    node.args, node.kwargs = (given.pop("query"), given.pop("key"), given.pop("value")), given


def _takes_grouped_heads(query: Sequence[Any], key: Sequence[Any], value: Sequence[Any]) -> bool:
    """Whether fused attention takes heads of these shapes with ``enable_gqa``."""
    same = len(query) == len(key) == len(value) == 4 and (key[1], key[3]) == (value[1], value[3])
    return same and query[1] % key[1] == 0 and key[3] <= _MOST_HEAD_FEATURES


def _shape(node: Any) -> torch.Size:
    made = example_of(node)
    if made is None:
        raise AssertionError(f"{node} is no tensor")
    return made.shape


def _unrepeated(node: Any) -> fx.Node | None:
    """x, where ``node`` is x with each of its heads (axis 1) several times in a row."""
    if not isinstance(node, fx.Node) or operator_name(node) not in ("reshape", "view", "repeat_interleave"):
        return None
    if operator_name(node) == "repeat_interleave":
        source = node.args[0]
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return source if isinstance(source, fx.Node) and isinstance(_repeats(node), int) and axis in (1, -3) else None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or operator_name(expanded) != "expand":
        return None
    shown = expanded.args[0]
    if not isinstance(shown, fx.Node) or not isinstance(shown.args[0], fx.Node):
        return None
    is_new_axis = (operator_name(shown) == "unsqueeze" and shown.args[1:] in ((2,), (-3,))) or (
        shown.target is operator.getitem and _adds_third_axis(shown.args[1])
    )
    if not is_new_axis:
        return None
    source = shown.args[0]
    batch, heads, *rest = _shape(source)
    repeated = _shape(expanded)
    as_was = len(repeated) == 5 and tuple(repeated[:2]) == (batch, heads) and tuple(repeated[3:]) == tuple(rest)
    return source if as_was and tuple(_shape(node)) == (batch, heads * repeated[2], *rest) else None


def _repeats(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")


def _adds_third_axis(index: Any) -> bool:
    """Whether ``x[index]`` is ``x[:, :, None]``."""
    every = slice(None, None, None)
    return isinstance(index, tuple) and index in [(every, every, None, *[every] * more) for more in range(3)]


# -------------------------------------------------------------------------------------------------------------------- notes


def _note(
    mask: fx.Node,
    attentions: Sequence[_Attention],
    kind: Kind | None,
    found: Allowed | None,
    unread: str | None,
    leaves: Sequence[fx.Node],
) -> str:
    calls = sum(a.mask is mask for a in attentions)
    shape = "x".join(str(size_hint(n)) for n in _shape(mask))
    what = f"the mask of {shape} of {calls} attention{'s' if calls > 1 else ''}"
    if kind is None:
        return f"{what} stays: {unread or _shape_of(found)}"
    instead = "they are told is_causal=True" if kind == "causal" else "it allows every key"
    read = [n for n in leaves if n in ancestors([mask])]
    guard = f", as long as {' and '.join(map(source_name, read))} say so, which is checked at each call" if read else ""
    return f"{what} is left out: {instead}{guard}"


def _shape_of(found: Allowed | None) -> str:
    if found is None:
        return "what it allows is not known to be an interval of the keys"
    return f"it allows each query up to {found.longest} of {found.keys} keys, and neither all nor all up to its own"

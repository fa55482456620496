"""The optimizers of this process, as far as they are known: those that were given (`actpass.set_optimizer`), and those that
were seen to step. torch says nothing when one is made, so before its first step an optimizer that was not given is unknown.

What a first step will add to an optimizer's state is known in closed form: by its class, or as its class says itself in a
method ``state_bytes(group, parameter)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from actpass.torch_compat import is_wrapper

_known: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, ...]] = WeakKeyDictionary()
"""With what they looked like when last seen."""


def clear() -> None:
    """Forget all."""
    _known.clear()


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Let the next `note` find it changed."""
    _known.pop(inner(optimizer), None)


def known() -> list[torch.optim.Optimizer]:
    return list(_known)


def note(optimizer: torch.optim.Optimizer) -> bool:
    """``optimizer`` is there. Whether it is new, or steps other parameters or has another state than when last seen."""
    optimizer = inner(optimizer)
    looks = len(optimizer.param_groups), sum(len(g["params"]) for g in optimizer.param_groups), len(optimizer.state)
    changed = _known.get(optimizer) != looks
    _known[optimizer] = looks
    return changed


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """What accelerate wraps."""
    wrapped = getattr(optimizer, "optimizer", None)
    return inner(wrapped) if isinstance(wrapped, torch.optim.Optimizer) else optimizer


def stepped_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def stepping(parameters: Iterable[torch.Tensor]) -> list[torch.optim.Optimizer]:
    """The known optimizers that step any of ``parameters``. FSDP2 runs a forward with whole stand-ins of the shards that an
    optimizer holds: there a shard is known by the whole's shape."""
    own = list(parameters)
    ids, shapes = {id(p) for p in own}, {tuple(p.shape) for p in own}
    return [o for o in known() if any(id(p) in ids or (is_shard(p) and tuple(p.shape) in shapes) for p in stepped_by(o))]


def is_shard(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "to_local") and is_wrapper(parameter)


def local(tensor: Any) -> torch.Tensor:
    """Of a sharded tensor what this rank holds."""
    return tensor.to_local() if is_shard(tensor) else tensor


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Those beside the parameters on their devices. What an optimizer keeps on the CPU for parameters elsewhere takes none of
    that device's memory."""
    found: list[torch.Tensor] = []
    for p in stepped_by(optimizer):
        leaves = pytree.tree_leaves(optimizer.state[p]) if p in optimizer.state else ()
        found += [t for t in leaves if isinstance(t, torch.Tensor) and t.device.type == p.device.type]
    return found


def state_to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the first step of ``optimizer`` will add for the parameters that have no state yet and want a gradient."""
    form = _form_of(optimizer)
    if form is _lbfgs:  # its first parameter has the state of all
        groups = optimizer.param_groups
        whole = sum(form(optimizer, g, local(p)) for g in groups for p in g["params"] if p.requires_grad)
        return max(0, whole - sum(map(_nbytes, state_tensors(optimizer))))
    return sum(
        form(optimizer, group, local(p))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and p not in optimizer.state
    )


def _form_of(optimizer: torch.optim.Optimizer) -> Form:
    own = getattr(optimizer, "state_bytes", None)
    if own is not None:
        return lambda _, group, p: own(group, p)
    return next((_FORMS[name] for name in map(_name, type(optimizer).__mro__) if name in _FORMS), _adam)


def assumed_state(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of state of an optimizer that is not known yet: AdamW's, two copies of every parameter that wants a gradient, and
    its step."""
    return sum(2 * _nbytes(local(p)) + _STEP for p in parameters if p.requires_grad)


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's Adam or AdamW, and what it holds is theirs."""
    return _name(type(optimizer)) in ("torch.Adam", "torch.AdamW")


def state_in_8_bits(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of state of torchao's AdamW8bit for those that want a gradient."""
    return sum(_low_bit_bytes(local(p), 8, 256, _BLOCK_OF_8_BITS) for p in parameters if p.requires_grad)


def scratch(optimizer: torch.optim.Optimizer) -> int:
    """What a step takes for a moment beside gradients and state, as torch's Adam does: two tensors as large as a parameter at a
    time; with ``foreach``, the default on a GPU, of all parameters at once; nothing if it is fused."""
    groups = optimizer.param_groups
    return max((scratch_of(g["params"], g.get("foreach"), fused=bool(g.get("fused"))) for g in groups), default=0)


def scratch_of(parameters: Iterable[torch.Tensor], foreach: bool | None = None, *, fused: bool = False) -> int:
    """As `scratch`, of one group. foreach: None is torch's own choice."""
    trained = [p for p in parameters if p.requires_grad]
    sizes = [_nbytes(local(p)) for p in trained]
    together = any(p.is_cuda for p in trained) if foreach is None else foreach
    return 0 if fused else 2 * (sum(sizes) if together else max(sizes, default=0))


def _nbytes(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()


# ------------------------------------------------------------------------------------------- state by class, in closed form

Form = Callable[[Any, Mapping[str, Any], torch.Tensor], int]
"""Of an optimizer, a group of its parameters, and one of these: bytes."""
_STEP = 4
"""A count of steps is a float32."""


def _copies(count: Callable[[Mapping[str, Any]], int], scalars: int = 1) -> Form:
    """As many copies of the parameter, and scalars of four bytes."""
    return lambda _, group, p: count(group) * _nbytes(p) + _STEP * scalars


def _adam(_: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
    return (3 if group.get("amsgrad") else 2) * _nbytes(p) + _STEP


def _sgd(_: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
    return _nbytes(p) if group["momentum"] else 0


def _lbfgs(_: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
    """Two histories, that fill up over as many steps, and four copies."""
    return (2 * group["history_size"] + 4) * _nbytes(p)


def _adafactor(_: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
    """Rows and columns of the second moment, and transformers' first moment, if it has a beta1."""
    kept = _nbytes(p) if group.get("beta1") is not None else 0
    if p.dim() < 2:
        return kept + _nbytes(p) + _STEP
    *outer, rows, columns = p.shape
    return kept + math.prod(outer) * (rows + columns) * p.element_size() + _STEP


def _low_bit(bits: int, table: int) -> Form:
    """torchao's: codes and a scale for each block of two moments, each with a table; small parameters as Adam's."""

    def nbytes(optimizer: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
        return _low_bit_bytes(p, bits, table, optimizer.block_size, 3 if group.get("amsgrad") else 2)

    return nbytes


_BLOCK_OF_8_BITS = 256


def _low_bit_bytes(p: torch.Tensor, bits: int, table: int, block: int, moments: int = 2) -> int:
    is_small = p.numel() < 4096 or p.numel() % block
    moment = _nbytes(p) if is_small else p.numel() * bits // 8 + 4 * (p.numel() // block) + 4 * table
    return moments * moment + _STEP


def _bitsandbytes(moments: int) -> Form:
    """Moments of 8 bits with a scale for each block of 256 if that was asked for, else of float32. All share a table of 256
    numbers for each moment, which comes with the first."""

    def nbytes(optimizer: Any, group: Mapping[str, Any], p: torch.Tensor) -> int:
        args = optimizer.args
        in_8_bits = (q for q in stepped_by(optimizer) if q.requires_grad and q.numel() >= args.min_8bit_size)
        if args.optim_bits == 8 and p.numel() >= args.min_8bit_size:
            tables = 4 * 256 if p is next(in_8_bits, None) else 0
            return moments * (p.numel() + 4 * -(-p.numel() // 256) + tables)
        return moments * 4 * p.numel()

    return nbytes


def _name(kind: type) -> str:
    """A class by its package and name: torch.optim.AdamW is ``torch.AdamW``, wherever in torch it lies."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


_TWO, _ONE = _copies(lambda _: 2), _copies(lambda _: 1)
_FORMS: dict[str, Form] = {
    **{f"torch.{name}": _adam for name in ("Adam", "AdamW")},
    **{f"torch.{name}": _TWO for name in ("SparseAdam", "RAdam", "Adamax", "Adadelta", "Rprop")},
    "torch.NAdam": _copies(lambda _: 2, 2),
    "torch.ASGD": _copies(lambda _: 1, 3),
    "torch.Adagrad": _ONE,  # which has it from the beginning
    "torch.RMSprop": _copies(lambda g: 1 + (g["momentum"] > 0) + bool(g["centered"])),
    "torch.Muon": _copies(lambda _: 1, 0),
    "torch.LBFGS": _lbfgs,
    "torch.SGD": _sgd,
    **dict.fromkeys(("torch.Adafactor", "transformers.Adafactor"), _adafactor),
    **{f"torchao.Adam{w}8bit": _low_bit(8, 256) for w in ("", "W")},
    **{f"torchao.Adam{w}4bit": _low_bit(4, 16) for w in ("", "W")},
    **{f"torchao.Adam{w}Fp8": _low_bit(8, 0) for w in ("", "W")},
    "bitsandbytes.Optimizer2State": _bitsandbytes(2),
    "bitsandbytes.Optimizer1State": _bitsandbytes(1),
}
"""By `_name`. Any other class is taken for Adam's until its first step has shown its state."""

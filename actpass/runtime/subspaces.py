"""The learned subspaces: who owns them, when they move, and how a compiled region gets them.

A subspace belongs to a parameter, not to compiled code: one graph may serve several modules, and several graphs one
module. It is found at each call by the parameter that the region runs with. It moves between two optimizer steps and never
within one, so that gradients that are accumulated lie in one subspace; a moved subspace is a new tensor, so that a forward
whose backward is still to come keeps its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from actpass.codecs import LEARNED
from actpass.codecs.generator import round_keys, step_seed
from actpass.codecs.precision import as_written
from actpass.codecs.projections.learned import (
    Spectrum,
    approximate_step,
    first_state,
    power_iteration_step,
    resized,
    state_shape,
)
from actpass.errors import StateError
from actpass.options import Config
from actpass.reporting.spectra import SubspaceRow
from actpass.runtime import plan_agreement as ranks
from actpass.torch_compat import FakeTensor, forked_rng, stand_ins, to_list

Keys = Sequence[torch.Tensor]
"""`round_keys` of the step's seed, and of that of what is random in learned bases."""
_PASSES = 3
"""Forwards of the first batch before the first step: block power steps from random directions."""
_WHOLE_MOVES = 10
"""The first moves, those of the first batch among them, go all the way: a model that has just begun to learn changes fast."""
_POINTS_PER_DIRECTION = 2
_SORTED_EVERY = 20
"""How many optimizer steps after the sketch that last did it a small move keeps the directions in the order of their energies
again."""
_TOGETHER = 64 << 20
"""Bytes of the states that small moves take together."""


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor that a region projects onto a learned subspace. method, width N, rank R: of the projection. position: in the
    region's arguments, of the parameter that the subspace belongs to. path: of that parameter. number: which of its
    subspaces of this method and width it is."""

    projection: str
    width: int
    rank: int
    position: int
    path: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.projection}.{self.width}.{self.number}"

    @property
    def shape(self) -> tuple[int, int]:
        return state_shape(LEARNED[self.projection], self.width, self.rank)

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        return 4 * rows * columns


def sites_of(plan: Mapping[str, Any], paths: Sequence[str | None]) -> tuple[Site, ...]:
    """The sites of a plan (as its `to_dict` has it) in the order in which the region takes their subspaces. paths: of its
    inputs."""
    found: list[Site] = []
    for d in plan["decisions"]:
        if d["projection"] in LEARNED and d["rank"] is not None:
            path = min(d["parameters"])  # the same in every graph, whatever order its backward has
            number = sum((s.path, s.projection, s.width) == (path, d["projection"], d["width"]) for s in found)
            found.append(Site(d["projection"], d["width"], d["rank"], paths.index(path), path, number))
    return tuple(found)


@dataclass(eq=False, slots=True)
class Subspace:
    """method, rank: of the projection. state: (N + 1, K) float32, see `actpass.codecs.projections.learned`. sketched: the sum
    of the sketches of the optimizer step ``step``. spectrum: what the last sketch said by which the directions were sorted,
    that of the step ``sorted_at``. moves: how often it moved. begun: whether the first batch was shown."""

    projection: str
    rank: int
    state: torch.Tensor
    sketched: torch.Tensor | None = None
    step: int = -1
    spectrum: Spectrum | None = None
    sorted_at: int = -1
    moves: int = 0
    begun: bool = True

    def note(self, step: int, sketched: torch.Tensor) -> None:
        if self.sketched is not None and self.step == step:
            sketched = sketched + torch.where(torch.isfinite(self.sketched[-1, 0]), self.sketched, 0)  # else: of a skipped step
        self.sketched = sketched
        self.step = step

    @property
    def size(self) -> float:
        """How far the next move goes."""
        return LEARNED[self.projection].step_size if self.moves >= _WHOLE_MOVES else 1.0

    @property
    def sorts(self) -> bool:
        """Whether the next small move looks at the order of the directions, and says what they hold."""
        return self.step - self.sorted_at >= _SORTED_EVERY

    def move(self, sketched: torch.Tensor) -> None:
        self.sketched = None
        self.state, spectrum = power_iteration_step(LEARNED[self.projection], self.state, sketched, self.rank, self.size)
        if spectrum is not None:
            self.spectrum, self.sorted_at = spectrum, self.step
            self.moves += 1

    def to_dict(self) -> dict[str, Any]:
        spectrum = None if self.spectrum is None else self.spectrum.captured
        plain = {"projection": self.projection, "rank": self.rank, "state": self.state, "sketched": self.sketched}
        return {**plain, "step": self.step, "spectrum": spectrum, "sorted_at": self.sorted_at, "moves": self.moves}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subspace:
        spectrum = None if data["spectrum"] is None else Spectrum(data["spectrum"])
        sketched = data["sketched"]
        fresh = None if sketched is None else sketched.clone()
        step, sorted_at = data["step"], data.get("sorted_at", data["step"])  # a state of before the second was kept
        return cls(data["projection"], data["rank"], data["state"].clone(), fresh, step, spectrum, sorted_at, data["moves"])


def _move(subspaces: Sequence[Subspace], sketches: Sequence[torch.Tensor]) -> None:
    """Move each by its sketch. Small moves of one shape go together: a GPU takes as long for one of them."""
    small: dict[Any, list[tuple[Subspace, torch.Tensor]]] = {}
    for subspace, sketched in zip(subspaces, sketches, strict=True):
        if subspace.size == 1 or subspace.spectrum is None:
            subspace.move(sketched)
        else:
            small.setdefault((subspace.state.shape, subspace.size, subspace.sorts), []).append((subspace, sketched))
    for (shape, size, sort), members in small.items():
        count = max(1, _TOGETHER // (4 * shape.numel()))
        for i in range(0, len(members), count):
            _nudge([s for s, _ in members[i : i + count]], [y for _, y in members[i : i + count]], size, sort=sort)


def _nudge(subspaces: Sequence[Subspace], sketches: Sequence[torch.Tensor], size: float, *, sort: bool) -> None:
    """All of one shape, each of which has a spectrum. Where they are sorted it is known of which the factors failed (a GPU
    is waited for then), and these move by eigenvectors."""
    states, captured = approximate_step(torch.stack([s.state for s in subspaces]), torch.stack(list(sketches)), size, sort=sort)
    failed: list[bool] = to_list(captured.isnan().any(1)) if captured is not None else [False] * len(subspaces)
    for i, (subspace, sketched) in enumerate(zip(subspaces, sketches, strict=True)):
        if failed[i]:
            subspace.move(sketched)
            continue
        subspace.state, subspace.sketched = states[i].clone(), None
        subspace.moves += 1
        if captured is not None:
            subspace.spectrum, subspace.sorted_at = Spectrum(captured[i].clone()), subspace.step


class Store:
    """The subspaces of parameters, which it does not keep alive. behind: has those that it takes copies of where it
    has none."""

    def __init__(self, behind: Store | None = None) -> None:
        self._of: MutableMapping[torch.Tensor, dict[str, Subspace]] = WeakIdKeyDictionary()
        self._behind = behind

    def of(self, parameter: torch.Tensor) -> dict[str, Subspace]:
        """By `Site.name`; where there are none, an empty one to fill."""
        if parameter not in self._of:
            known = self._behind.of(parameter) if self._behind is not None else {}
            self._of[parameter] = {name: replace(subspace) for name, subspace in known.items()}
        return self._of[parameter]

    def clear(self) -> None:
        self._of.clear()


STORE = Store()
"""Those of this process."""


@dataclass(frozen=True, kw_only=True)
class WithSubspaces:
    """``run(args, keys, step)`` for a compiled ``fn(*args, *keys, points, *states) -> (*outputs, *sketches)``. copies: whether
    ``fn`` keeps the memory of what it returns, as CUDA graphs do. written: of each argument, whether ``fn`` writes to it."""

    fn: Callable[..., Any]
    sites: Sequence[Site]
    config: Config
    device: torch.device
    store: Store = STORE
    copies: bool = False
    written: Sequence[bool] = ()
    _fewest: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Two points for steps without a sketch: none would be a special case in every back end. They are made here, for DDP's
        graph splitting calls under a fake mode first."""
        object.__setattr__(self, "_fewest", torch.zeros(2, dtype=torch.float32, device=self.device))

    def __call__(self, args: tuple[Any, ...], keys: Keys, step: int) -> Any:
        if any(isinstance(a, FakeTensor) for a in args):  # DDP's graph splitting asks what comes out of a part
            return self._call(args, keys, self._fewest, [self._empty(site) for site in self.sites])[0]
        config, device = self.config, self.device
        with as_written(device):
            held = [_held(self.store, site, args[site.position], config.seed, device) for site in self.sites]
        if not all(s.begun for s in held):
            self._begin(args, keys, held)
        due = [s for s in held if s.sketched is not None and s.step < step]
        with as_written(device):
            _move(due, ranks.summed([s.sketched for s in due if s.sketched is not None]))
        shown = [config.sketches_at(s.projection, step) or not s.moves for s in held]
        points = self._points(step) if any(shown) else self._fewest
        outputs, sketches = self._call(args, keys, points, held)
        for subspace, sketched, show in zip(held, sketches, shown, strict=True):
            if show:
                subspace.note(step, sketched.clone() if self.copies else sketched)
        return outputs

    def _call(self, args: Sequence[Any], keys: Keys, points: torch.Tensor, held: Sequence[Subspace]) -> tuple[Any, Any]:
        results = self.fn(*args, *keys, points, *(s.state for s in held))
        return results[: len(results) - len(held)], [y.detach() for y in results[len(results) - len(held) :]]

    def _begin(self, args: Sequence[Any], keys: Keys, held: Sequence[Subspace]) -> None:
        """Show the first batch to the subspaces that are new."""
        fresh = [not s.begun for s in held]
        devices = sorted({a.device.index for a in args if isinstance(a, torch.Tensor) and a.is_cuda})
        for i in range(_PASSES):
            with forked_rng(devices), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                copies = [_scratch_copy(a, written=w) for a, w in itertools.zip_longest(args, self.written, fillvalue=False)]
                sketches = ranks.summed(self._call(copies, keys, self._points(-1 - i), held)[1])
            for subspace, sketched, new in zip(held, sketches, fresh, strict=True):
                if new:
                    with as_written(self.device):
                        subspace.move(sketched)
                    subspace.begun = True

    def _points(self, step: int) -> torch.Tensor:
        return _points(self.config.seed, step, most_points(self.sites), self.device)

    def _empty(self, site: Site) -> Subspace:
        return Subspace(site.projection, site.rank, torch.zeros(site.shape, dtype=torch.float32, device=self.device))


def _same(x: torch.Tensor) -> torch.Tensor:
    """In place of the hooks of a checkpoint around the region, which counts what its one forward saves."""
    return x


def _scratch_copy(argument: Any, *, written: bool) -> Any:
    """What a forward may overwrite in place of ``argument``: a copy, with its strides, of everything but parameters that it
    does not write to."""
    if not isinstance(argument, torch.Tensor) or (isinstance(argument, torch.nn.Parameter) and not written):
        return argument
    with torch.enable_grad():
        strides = argument.stride()
        if all(strides) or not argument.numel():
            copy = torch.empty_strided(argument.shape, strides, dtype=argument.dtype, device=argument.device)
            copy.copy_(argument.detach())
        else:  # expanded: each element once
            once = [1 if stride == 0 else size for size, stride in zip(argument.shape, strides, strict=True)]
            copy = argument.detach().as_strided(once, strides).clone().expand(argument.shape)
        return copy.requires_grad_().view_as(copy) * 1 if argument.requires_grad and all(strides) else copy


def _held(store: Store, site: Site, parameter: torch.Tensor, seed: int, device: torch.device) -> Subspace:
    own, projection = store.of(parameter), LEARNED[site.projection]
    found = own.get(site.name)
    key = functools.partial(round_keys, step_seed(seed, site.number), device)
    if found is None:
        state = first_state(projection, key(), site.width, site.rank)
        found = own[site.name] = Subspace(site.projection, site.rank, state, begun=False)
    if found.state.device != device:
        found.state = found.state.to(device)
        found.sketched = None if found.sketched is None else found.sketched.to(device)
    if found.rank != site.rank:
        found.state, found.rank, found.sketched = resized(projection, found.state, key(), site.rank), site.rank, None
    return found


def most_points(sites: Sequence[Site]) -> int:
    """How many tokens a sketch samples."""
    return max(max(LEARNED[site.projection].points, _POINTS_PER_DIRECTION * site.shape[1]) for site in sites)


def _points(seed: int, step: int, count: int, device: torch.device) -> torch.Tensor:
    """Where to sample tokens: one point in each of ``count`` equal parts of [0, 1), so that all parts of a batch count alike.
    The same on all ranks, each of which has tokens of its own."""
    cpu = torch.device("cpu")  # whatever the default is
    generator = torch.Generator(cpu).manual_seed(step_seed(seed, step))
    points = (torch.arange(count, device=cpu) + torch.rand(count, generator=generator, dtype=torch.float32, device=cpu)) / count
    return points.clamp_(max=1 - 2**-24).to(device)


def residual_energies(inputs: Sequence[Any], paths: Sequence[str | None]) -> tuple[tuple[str, float], ...]:
    """The energy beyond the principal directions that the last sketch of each parameter's first subspace showed, by the
    parameter's path; of those among ``inputs`` that have one."""
    found: dict[str, float] = {}
    for parameter, path in zip(inputs, paths, strict=True):
        if path is not None and not isinstance(parameter, FakeTensor):
            for s in STORE.of(parameter).values():
                if s.spectrum is not None and path not in found:
                    found[path] = s.spectrum.tail(LEARNED[s.projection].principal(s.rank))
    return tuple(found.items())


def owners(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whom the subspaces of each parameter belong to, by its name: to itself, or under FSDP2 to what a forward runs with in its
    place, once it has run."""
    instead = {i: p for module in model.modules() for i, p in stand_ins(module).items()}
    return {name: instead.get(id(p), p) for name, p in model.named_parameters()}


def rows(model: torch.nn.Module) -> Iterator[SubspaceRow]:
    """The subspaces of ``model``'s parameters as they stand."""
    for name, owner in owners(model).items():
        for s in STORE.of(owner).values():
            captured = () if s.spectrum is None else tuple(to_list(s.spectrum.captured))
            principal = LEARNED[s.projection].principal(s.rank)
            nbytes = s.state.numel() * s.state.element_size()
            yield SubspaceRow(name, s.projection, s.state.shape[0] - 1, s.rank, principal, s.moves, nbytes, captured)


def state_dict(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Parameter's name -> its subspaces."""
    own = {name: STORE.of(owner) for name, owner in owners(model).items()}
    return {name: {k: s.to_dict() for k, s in found.items()} for name, found in own.items() if found}


def load_state_dict(model: torch.nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the subspaces of ``model`` in the place of all that it has. Raises `StateError` and changes nothing if a name is no
    parameter of ``model``, or an entry no subspace of it. Under FSDP2 a collective: what has not run is gathered once."""
    parameters = dict(model.named_parameters())
    loaded: dict[str, dict[str, Subspace]] = {}
    for name, entries in state.items():
        if name not in parameters:
            near = ", ".join(list(parameters)[:3])
            raise StateError(f"state has a subspace of {name!r}, which is no parameter of the model. Allowed: {near}, ...")
        try:
            loaded[name] = {k: _checked(k, v) for k, v in entries.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"state of the subspaces of {name!r} can't be read: {type(error).__name__}: {error}") from error
    if loaded:
        _gather(model)
    for name, owner in owners(model).items():
        own = STORE.of(owner)
        own.clear()
        own.update(loaded.get(name, {}))


def _gather(model: torch.nn.Module) -> None:
    """Let FSDP2 make what a forward will run with, one sharded module at a time."""
    for module in model.modules():
        if hasattr(module, "unshard") and not stand_ins(module):
            module.unshard()  # pyright: ignore[reportCallIssue]
            module.reshard()  # pyright: ignore[reportCallIssue]


def _checked(name: str, data: Mapping[str, Any]) -> Subspace:
    projection, width, _ = name.split(".")
    found = Subspace.from_dict(data)
    if found.projection != projection or projection not in LEARNED:
        raise ValueError(f"{name!r} holds the projection {found.projection!r}. Allowed: {', '.join(LEARNED)}")
    if not 1 <= found.rank <= int(width):
        raise ValueError(f"{name!r} has the rank {found.rank}")
    for tensor in (found.state, found.sketched):
        if tensor is not None and tuple(tensor.shape) != state_shape(LEARNED[projection], int(width), found.rank):
            raise ValueError(f"{name!r}, rank {found.rank}, has a tensor of {tuple(tensor.shape)}")
    if not bool(torch.isfinite(found.state).all()):
        raise ValueError(f"{name!r} has a state that is not finite")
    return found

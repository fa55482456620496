"""The learned subspaces: who owns them, when they move, and how a compiled region gets them.

A subspace belongs to a parameter, not to compiled code: one graph may serve several modules, and several graphs one
module. It is found at each call by the parameter that the region runs with. It moves between two optimizer steps and never
within one, so that gradients that are accumulated lie in one subspace; a moved subspace is a new tensor, so that a forward
whose backward is still to come keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from actpass._torch import FakeTensor
from actpass.codecs import LEARNED
from actpass.codecs.generator import round_keys, step_seed
from actpass.codecs.learned import Spectrum, first_state, moved, resized, state_shape
from actpass.config import Config
from actpass.errors import StateError
from actpass.report.spectra import SubspaceRow

_PASSES = 3
"""Forwards of the first batch before the first step: block power steps from random directions."""
_LEAST_POINTS = 1024
_POINTS_PER_DIRECTION = 2


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor that a region projects onto a learned subspace. method, width N, rank R: of the projection. position: in the
    region's arguments, of the parameter that the subspace belongs to. path: of that parameter. number: which of the
    parameter's subspaces it is."""

    method: str
    width: int
    rank: int
    position: int
    path: str
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        return state_shape(LEARNED[self.method], self.width, self.rank)

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        return 4 * rows * columns


def sites_of(plan: Mapping[str, Any], paths: Sequence[str | None]) -> tuple[Site, ...]:
    """The sites of a plan (as its `to_dict` has it) in the order in which the region takes their subspaces. paths: of its
    inputs."""
    found: list[Site] = []
    for d in plan["decisions"]:
        if d["method"] in LEARNED and d["rank"] is not None:
            path = min(d["parameters"])  # the same in every graph, whatever order its backward has
            number = sum(s.path == path for s in found)
            found.append(Site(d["method"], d["width"], d["rank"], paths.index(path), path, number))
    return tuple(found)


@dataclass(eq=False, slots=True)
class Subspace:
    """state: (N + 1, K) float32, see `actpass.codecs.learned`. sketched: the sum of the sketches of the optimizer step
    ``step``. spectrum: what the last sketch said. moves: how often it moved."""

    method: str
    rank: int
    state: torch.Tensor
    sketched: torch.Tensor | None = None
    step: int = -1
    spectrum: Spectrum | None = None
    moves: int = 0

    def note(self, step: int, sketched: torch.Tensor) -> None:
        self.sketched = sketched if self.sketched is None or self.step != step else self.sketched + sketched
        self.step = step

    def move(self, sketched: torch.Tensor, size: float) -> None:
        self.state, spectrum = moved(LEARNED[self.method], self.state, sketched, self.rank, size)
        self.spectrum = spectrum or self.spectrum
        self.sketched = None
        self.moves += 1

    def to_dict(self) -> dict[str, Any]:
        spectrum = None if self.spectrum is None else self.spectrum.captured
        plain = {"method": self.method, "rank": self.rank, "state": self.state, "sketched": self.sketched}
        return {**plain, "step": self.step, "spectrum": spectrum, "moves": self.moves}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subspace:
        spectrum = None if data["spectrum"] is None else Spectrum(data["spectrum"])
        sketched = data["sketched"]
        fresh = None if sketched is None else sketched.clone()
        return cls(data["method"], data["rank"], data["state"].clone(), fresh, data["step"], spectrum, data["moves"])


class Store:
    """The subspaces of parameters, which it does not keep alive. behind: has those that it takes copies of where it
    has none."""

    def __init__(self, behind: Store | None = None) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._behind = behind

    def of(self, parameter: torch.Tensor) -> dict[str, Subspace]:
        """By ``method.number``."""
        if parameter not in self._of:
            known = self._behind.of(parameter) if self._behind is not None else {}
            self._of[parameter] = {name: replace(subspace) for name, subspace in known.items()}
        return self._of[parameter]

    def clear(self) -> None:
        self._of.clear()


STORE = Store()
"""Those of this process."""


def with_subspaces(
    fn: Callable[..., Any], sites: Sequence[Site], config: Config, device: torch.device, store: Store = STORE
) -> Callable[[tuple[Any, ...], torch.Tensor, int], Any]:
    """``run(args, key, step)`` for a compiled ``fn(*args, key, points, *states) -> (*outputs, *sketches)``."""
    count = max(_LEAST_POINTS, *(_POINTS_PER_DIRECTION * site.shape[1] for site in sites))
    nothing = torch.empty(0, device=device)

    def call(args: tuple[Any, ...], key: torch.Tensor, points: torch.Tensor, held: Sequence[Subspace]) -> tuple[Any, Any]:
        results = fn(*args, key, points, *(s.state for s in held))
        return results[: len(results) - len(held)], [y.detach() for y in results[len(results) - len(held) :]]

    def begin(args: tuple[Any, ...], key: torch.Tensor, held: Sequence[Subspace]) -> None:
        with _as_if_nothing_had_run(args):
            for i in range(_PASSES):
                sketches = _summed(call(args, key, _points(config.seed, -1 - i, count, device), held)[1])
                for subspace, sketched in zip(held, sketches, strict=True):
                    if subspace.step < 0:
                        subspace.move(sketched, 1.0)

    def run(args: tuple[Any, ...], key: torch.Tensor, step: int) -> Any:
        if any(isinstance(a, FakeTensor) for a in args):  # DDP's graph splitting asks what comes out of a part
            own = [Subspace(s.method, s.rank, torch.zeros(s.shape, device=device)) for s in sites]
            return call(args, key, torch.empty(0, device=device), own)[0]
        held = [_held(store, site, args[site.position], config.seed, device) for site in sites]
        if any(s.moves == 0 for s in held):
            begin(args, key, held)
        due = [s for s in held if s.sketched is not None and s.step < step]
        for subspace, sketched in zip(due, _summed([s.sketched for s in due if s.sketched is not None]), strict=True):
            subspace.move(sketched, LEARNED[subspace.method].step_size)
        refresh = step % config.interval == 0
        outputs, sketches = call(args, key, _points(config.seed, step, count, device) if refresh else nothing, held)
        if refresh:
            for subspace, sketched in zip(held, sketches, strict=True):
                subspace.note(step, sketched)
        return outputs

    return run


def _held(store: Store, site: Site, parameter: torch.Tensor, seed: int, device: torch.device) -> Subspace:
    own, method = store.of(parameter), LEARNED[site.method]
    name = f"{site.method}.{site.number}"
    found = own.get(name)
    if found is None:
        key = round_keys(step_seed(seed, site.number), device)
        found = own[name] = Subspace(site.method, site.rank, first_state(method, key, site.width, site.rank))
    if found.state.device != device:
        found.state = found.state.to(device)
        found.sketched = None if found.sketched is None else found.sketched.to(device)
    if found.rank != site.rank:
        key = round_keys(step_seed(seed, site.number), device)
        found.state, found.rank, found.sketched = resized(method, found.state, key, site.rank), site.rank, None
    return found


def _points(seed: int, step: int, count: int, device: torch.device) -> torch.Tensor:
    """Where to sample tokens: one point in each of ``count`` equal parts of [0, 1), so that all parts of a batch count alike.
    The same on all ranks, each of which has tokens of its own."""
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    points = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return points.clamp_(max=1 - 2**-24).to(device)


def _summed(sketches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Over the ranks, in one collective: all have the same subspaces then, bit for bit."""
    if not sketches or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(sketches)
    together = torch.cat([y.flatten() for y in sketches])
    dist.all_reduce(together)
    return [part.view_as(y) for part, y in zip(together.split([y.numel() for y in sketches]), sketches, strict=True)]


@contextmanager
def _as_if_nothing_had_run(args: Sequence[Any]) -> Iterator[None]:
    """Random state, and what a forward writes into its inputs (running statistics), are put back."""
    before = [(a, a.clone()) for a in args if isinstance(a, torch.Tensor) and not a.requires_grad]
    devices = sorted({a.device.index for a in args if isinstance(a, torch.Tensor) and a.is_cuda})
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for tensor, copy in before:
            tensor.copy_(copy)


def rows(model: torch.nn.Module) -> Iterator[SubspaceRow]:
    """The subspaces of ``model``'s parameters as they stand."""
    for name, parameter in model.named_parameters():
        for s in STORE.of(parameter).values():
            captured = () if s.spectrum is None else tuple(s.spectrum.captured.tolist())
            principal = LEARNED[s.method].principal(s.rank)
            nbytes = s.state.numel() * s.state.element_size()
            yield SubspaceRow(name, s.method, s.state.shape[0] - 1, s.rank, principal, s.moves, nbytes, captured)


def state_dict(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Parameter's name -> its subspaces."""
    own = {name: STORE.of(p) for name, p in model.named_parameters()}
    return {name: {k: s.to_dict() for k, s in found.items()} for name, found in own.items() if found}


def load_state_dict(model: torch.nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `StateError` and changes nothing if a name is no parameter of ``model``, or an entry no subspace of it."""
    parameters = dict(model.named_parameters())
    loaded: list[tuple[torch.Tensor, dict[str, Subspace]]] = []
    for name, entries in state.items():
        if name not in parameters:
            near = ", ".join(list(parameters)[:3])
            raise StateError(f"state has a subspace of {name!r}, which is no parameter of the model. Allowed: {near}, ...")
        try:
            loaded.append((parameters[name], {k: Subspace.from_dict(v) for k, v in entries.items()}))
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(f"state of the subspaces of {name!r} can't be read: {type(error).__name__}: {error}") from error
    for parameter, subspaces in loaded:
        STORE.of(parameter).update(subspaces)

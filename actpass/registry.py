"""Registries: what a package, this one or another, adds under a name.

Another package adds to a registry through an entry point of its group. The entry point's name is the registered name; its value
is whatever registers it when its module is imported, the class itself as a rule::

    [project.entry-points."actpass.codecs"]
    log8 = "my_package.log8:Log8"
"""

from __future__ import annotations

import difflib
import hashlib
import secrets
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from actpass.errors import PluginError, RegistryError

T = TypeVar("T")
V = TypeVar("V")
_OWN = __name__.partition(".")[0]


class Registry(Mapping[str, T], Generic[T]):
    """Name -> value, in the order of registration; other packages' values last.

    noun: what a value is, for errors. group: of entry points; they are loaded at the first lookup, not before. Raises
    `RegistryError` for a name that is unknown or taken, `PluginError` for an entry point that can't be loaded.
    """

    def __init__(self, noun: str, group: str) -> None:
        self.noun, self.group = noun, group
        self._values: dict[str, T] = {}
        self._owners: dict[str, str] = {}
        self._loaded = False
        _ALL.append(self)

    def register(self, name: str, value: T, owner: str | None = None) -> None:
        """Add ``value``. owner: the module that it is from, by default that of the value or of its class."""
        module: str = owner or getattr(value, "__module__", None) or type(value).__module__
        if name in self._values:
            raise RegistryError(
                f"the {self.noun} {name!r} of {module} has the name of one of {self._owners[name]}. Give it another name."
            )
        self._values[name], self._owners[name] = value, module

    def __getitem__(self, name: str | None) -> T:
        self._load()
        if name not in self._values:
            near = difflib.get_close_matches(str(name), self._values, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RegistryError(f"unknown {self.noun} {name!r}.{hint} Known: {', '.join(self._values)}.")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(tuple(self._values))

    def __len__(self) -> int:
        self._load()
        return len(self._values)

    @property
    def foreign(self) -> dict[str, str]:
        """Name -> module, of what other packages have added."""
        return {name: self._owners[name] for name in self if self._owners[name].partition(".")[0] != _OWN}

    @contextmanager
    def temporary(self) -> Generator[None, None, None]:
        """Forget at the end what was registered inside. Entry points are read anew inside, and again behind it."""
        values, owners = dict(self._values), dict(self._owners)
        self._loaded = False
        try:
            yield
        finally:
            self._values, self._owners, self._loaded = values, owners, False

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # a module that is being loaded may look names up
        for entry in entry_points(group=self.group):
            if entry.name in self._values:
                continue
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            plugin = f"the {self.noun} {entry.name!r} of {package} (entry point {entry.value!r} in {self.group!r})"
            try:
                entry.load()
            except Exception as error:
                self._loaded = False
                raise PluginError(
                    f"{plugin} can't be loaded: {type(error).__name__}: {error}. Mend or remove {package}."
                ) from error
            if entry.name not in self._values:
                self._loaded = False
                raise PluginError(f"{plugin} was loaded and has registered nothing of that name.")


class Selection(Mapping[str, V], Generic[V]):
    """Those values of a registry that are of one kind."""

    def __init__(self, registry: Registry[Any], kind: type[V]) -> None:
        self._registry, self._kind = registry, kind

    def __getitem__(self, name: str | None) -> V:
        value = self._registry[name]
        if not isinstance(value, self._kind):
            raise RegistryError(f"the {self._registry.noun} {name!r} is no {self._kind.__name__}. Known: {', '.join(self)}.")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._registry and isinstance(self._registry[str(name)], self._kind)

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self._registry.items() if isinstance(value, self._kind))

    def __len__(self) -> int:
        return sum(1 for _ in self)


_ALL: list[Registry[Any]] = []


def instance_of(value: T | Callable[[], T]) -> T:
    """``value``, or an instance of it where it is a class."""
    return value() if isinstance(value, type) else value  # pyright: ignore[reportReturnType]


def foreign_sources() -> str:
    """Of what other packages have added to the registries: names, settings, and a hash of the sources. Part of the compile
    cache's key: changed code must not find old graphs."""
    rows = [
        f"{r.group} {name} {_settings(r[name])} {_hash_of(module)}" for r in _ALL for name, module in sorted(r.foreign.items())
    ]
    return "\n".join(rows)


def _settings(value: Any) -> str:
    return repr(value) if is_dataclass(value) else repr(sorted(getattr(value, "__dict__", {}).items()))


@cache
def _hash_of(module: str) -> str:
    """Of all files of the package that the module is in, or of the module alone; random where there is none (a notebook)."""
    found = sys.modules[module]
    file, package = getattr(found, "__file__", None), getattr(found, "__package__", None)
    if file is None:
        return secrets.token_hex(8)
    files = sorted(Path(file).parent.rglob("*.py")) if package else [Path(file)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()

"""The optimizers by their names, also those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from actpass.registry import Registry

Recipe = Callable[..., torch.optim.Optimizer]
R = TypeVar("R", bound=Recipe)

OPTIMIZERS: Registry[Recipe] = Registry("optimizer", "actpass.optimizers")
"""Each takes parameters, named ones or groups of them, as any torch optimizer, and ``lr``, ``betas`` and ``weight_decay``."""


def register_optimizer(name: str) -> Callable[[R], R]:
    """A decorator that adds a class of optimizers, or a function that composes one of transforms, under ``name``."""

    def add(recipe: R) -> R:
        OPTIMIZERS.register(name, recipe)
        return recipe

    return add

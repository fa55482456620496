"""Optimizers that step inside the subspaces that the gradients lie in (``options={"weight_gradient_format": "low_rank"}``).

One class, `ComposedOptimizer`, runs a chain of transforms (`actpass.optim.transforms`) on each parameter's gradient: on its
coefficients, if it is in factors, else on the gradient itself, so that one optimizer serves ``model.parameters()``. The
optimizers below are chains, each with its paper; `OPTIMIZERS` has them by name, and those of other packages.
"""

from actpass.optim.chain import ComposedOptimizer
from actpass.optim.optimizers import AdamW, AdaPM, CompActAdamW, LazySubspaceAdamW, OasisAdamW
from actpass.optim.registry import OPTIMIZERS, register_optimizer

__all__ = [
    "OPTIMIZERS",
    "AdaPM",
    "AdamW",
    "CompActAdamW",
    "ComposedOptimizer",
    "LazySubspaceAdamW",
    "OasisAdamW",
    "register_optimizer",
]

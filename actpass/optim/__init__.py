"""Optimizers that step inside the subspaces that the gradients lie in (``options={"gradients": "low_rank"}``).

One class, `ComposedOptimizer`, runs a chain of transforms (`actpass.optim.transforms`) on each parameter's gradient: on its
coefficients, if it is in factors, else on the gradient itself, so that one optimizer serves ``model.parameters()``. The
optimizers below are chains, each with its paper.
"""

from actpass.optim.chain import ComposedOptimizer
from actpass.optim.optimizers import AdamW, AdaPM, CompActAdamW, LazySubspaceAdamW, OasisAdamW

__all__ = ["AdaPM", "AdamW", "CompActAdamW", "ComposedOptimizer", "LazySubspaceAdamW", "OasisAdamW"]

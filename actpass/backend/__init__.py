"""``torch.compile(model, backend="actcomp")``: from Dynamo's graph to a compiled callable."""

from actpass.backend.backend import actcomp

__all__ = ["actcomp"]

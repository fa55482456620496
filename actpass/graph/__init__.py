"""Joint graph -> facts: which matmuls are weight gradients, which tensors are saved, and what the backward does with each.

Knows no policy and no method.
"""

from actpass.graph.contractions import Contraction, Finding, find_contractions
from actpass.graph.cost import count_matmuls
from actpass.graph.identity import fingerprint, plain_inputs
from actpass.graph.inline import inline_regions
from actpass.graph.inputs import GraphInputs, arguments_of
from actpass.graph.joint import Joint
from actpass.graph.uses import Use, UseKind

__all__ = [
    "Contraction",
    "Finding",
    "GraphInputs",
    "Joint",
    "Use",
    "UseKind",
    "arguments_of",
    "count_matmuls",
    "find_contractions",
    "fingerprint",
    "inline_regions",
    "plain_inputs",
]

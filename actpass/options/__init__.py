"""``options=`` of ``torch.compile``, checked, as one frozen value."""

from actpass.options.memory_budget import global_budget, parse_memory_budget
from actpass.options.options import Config, exactly, matches
from actpass.options.parsing import options_for, parse
from actpass.options.tensor_options import TensorOptions

__all__ = [
    "Config",
    "TensorOptions",
    "exactly",
    "global_budget",
    "matches",
    "options_for",
    "parse",
    "parse_memory_budget",
]

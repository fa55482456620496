"""Records on disk, beside Inductor's cache: on a cache hit neither the pass nor the partitioner runs, and the report still
has to say what the cached code does.

Each record carries a nonce that is part of the compile cache's key. A record that is lost draws a new nonce, which
misses the cache and compiles anew: a cached graph never comes without its record, and never with another one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from actpass.ir.graph_inputs import GraphInputs
from actpass.options import Config
from actpass.registry import foreign_sources
from actpass.reporting import Record
from actpass.torch_compat import functorch_config, records_dir, returns_to_a_graph_break


@cache
def source_hash() -> str:
    """A hash of this package's own sources: changed code must not find old graphs."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def region_key(gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: GraphInputs, config: Config, peak: object) -> str:
    """What the pass's result may depend on: graph, inputs' metadata, options, budget, versions, and the modes of tracing."""
    parts = [
        gm.print_readable(print_output=False),
        *(_metadata(e) for e in example_inputs),
        repr(inputs),
        repr(returns_to_a_graph_break(gm)),
        repr(config),
        repr(peak),
        torch.__version__,
        source_hash(),
        foreign_sources(),
        repr([(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]),
        repr((torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())),
        repr((functorch_config.activation_memory_budget, functorch_config.ban_recompute_materialized_backward)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _metadata(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{tuple(x.shape)} {tuple(x.stride())} {x.dtype} {x.device} {x.requires_grad} {type(x).__name__}"
    return repr(x)


def load(key: str) -> tuple[str, Record | None]:
    """(nonce, record) that was stored for ``key``; a fresh nonce and None if there is none that can be read."""
    try:
        data = json.loads(_path(key).read_text())
        return data["nonce"], Record.from_dict(data["record"])
    except (OSError, ValueError, KeyError, TypeError):
        return secrets.token_hex(8), None


def store(key: str, nonce: str, record: Record) -> None:
    """Write atomically: ranks and worker processes share the directory."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump({"nonce": nonce, "record": record.to_dict()}, file)
    os.replace(temporary, path)


def _path(key: str) -> Path:
    return Path(records_dir()) / f"{key}.json"

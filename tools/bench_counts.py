"""What a row's backward graph costs and what crosses into it, read from graphs and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from actpass import Report
from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.diagnostics.explain import explain_model
from actpass.ir.joint_graph import storage_root, tensor_bytes
from actpass.ir.op_cost import count_matmuls

OFF = {"policy": "exact", "memory_budget": 1.0}
_PADDINGS = (1, 4, 8)  # Inductor pads a matmul's width to a multiple of one of these


@dataclass(frozen=True, slots=True)
class Counts:
    """saved_bytes_reported: what crosses into the backward, parameters and inputs excluded. logits_bytes: of it, tensors
    whose last dimension is the vocabulary, and the gradients that a loss in pieces forms early in their place. None: not
    known for this kind of row."""

    saved_bytes_reported: int | None = None
    logits_bytes: int | None = None
    backward_matmul_flops: int | None = None
    extra_matmuls: int | None = None
    extra_attention: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)

    @classmethod
    def total(cls, parts: Sequence[Counts]) -> Counts:
        return cls(**{f.name: sum(getattr(part, f.name) or 0 for part in parts) for f in fields(cls)})


def is_logits(shape: Sequence[Any], vocab: int) -> bool:
    return len(shape) > 1 and shape[-1] in {-(-vocab // k) * k for k in _PADDINGS}


def counts_of_report(report: Report, vocab: int) -> Counts:
    totals = report.totals
    sites = [site for region in report.regions for site in region.sites]
    return Counts(
        report.saved_bytes,
        sum(site.bytes_after for site in sites if is_logits(site.shape, vocab) or EARLY_GRADIENT in site.reason),
        totals.backward_matmul_flops,
        totals.extra_matmuls,
        totals.extra_attention,
    )


def count_default(model: nn.Module, batch: Mapping[str, Tensor], vocab: int) -> Counts:
    """Of Inductor's own cut, which `explain` finds with compression off. Runs the model's forward once in eager mode."""
    return counts_of_report(explain_model(model, (), batch, OFF).report, vocab)


def count_eager(forward: Callable[[], Tensor], model: nn.Module, vocab: int) -> Counts:
    """Only the logits: each storage that autograd saves once, parameters excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    logits: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if is_logits(t.shape, vocab) and storage.data_ptr() not in own:
            logits[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss
    return Counts(logits_bytes=sum(logits.values()))


@dataclass(frozen=True)
class BudgetCut(CustomPartitionerFn):
    """Inductor's own partitioner under ``activation_memory_budget=budget``, counting what it returns.

    The default one is called with the same arguments; entering here rather than by the global setting keeps the setting of
    one row from another's, and Dynamo from taking two rows for the same backend.
    """

    label: str
    budget: float
    vocab: int
    found: ClassVar[dict[str, list[Counts]]] = {}  # not a field: a partitioner is pickled into the compile cache's key

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with functorch_config.patch(activation_memory_budget=self.budget):
            forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        counts = _counts_of_graphs(forward, backward, kwargs["num_fwd_outputs"], self.vocab)
        self.found.setdefault(self.label, []).append(counts)
        return forward, backward

    def uuid(self) -> Any:
        return ("actpass tools, budget cut", self.label)

    def counts(self) -> Counts:
        return Counts.total(self.found.get(self.label, []))


def _counts_of_graphs(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int, vocab: int) -> Counts:
    (out,) = forward.graph.find_nodes(op="output")
    crossing = [n for n in out.args[0][num_fwd_outputs:] if isinstance(n, fx.Node)]
    roots = {storage_root(n) for n in crossing}
    saved = {r: tensor_bytes(r) for r in roots if r.op not in ("placeholder", "get_attr")}
    matmuls = count_matmuls(forward.graph, backward.graph)
    return Counts(
        sum(saved.values()),
        sum(b for r, b in saved.items() if b and is_logits(r.meta["val"].shape, vocab)),
        matmuls.flops,
        matmuls.extra_matmuls,
        matmuls.extra_attention,
    )

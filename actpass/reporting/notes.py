"""What the user should know of a region beside its rows, in sentences."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator

import torch

from actpass.analysis.partitioned import PartitionStages
from actpass.analysis.weight_gradients import WeightGradientMatmuls
from actpass.ir.joint_graph import Joint, builtin_name, rule_of
from actpass.options import Config, matches
from actpass.passes.base import RegionState
from actpass.plan import Plan
from actpass.reporting.record import SiteRow


def loss_notes(done: RegionState) -> Iterator[str]:
    """What became of the loss."""
    chunked = done.chunked
    if chunked is not None:
        yield f"the loss is formed in {chunked.pieces} chunks; {chunked.logits_bytes} bytes of logits never exist at once"
    if done.joint.inputs.deferred:
        yield "the logits are returned deferred: they are computed when they are first read"
    if done.why_whole is not None:
        yield f"the loss is formed whole: {done.why_whole}"


def region_notes(
    plan: Plan, sites: Iterable[SiteRow], cuts: PartitionStages, config: Config, finding: WeightGradientMatmuls, deferred: int
) -> Iterable[str]:
    """What overrides, projections and the cut leave undone. deferred: how many results are computed when they are read."""
    read = [c.parameters for c in finding.contractions]
    used = {config.tensor_options_of(paths)[1] for paths in read}
    for pattern, _ in config.module_overrides:
        if pattern not in used and not any(matches(pattern, s.module) for s in sites):
            yield f"override {pattern!r} decided no site of this region"
    if not plan.projections and any(config.tensor_options_of(paths)[0].projection for paths in read or [()]):
        yield f"no site is projected: {_first_reason(plan, finding)}"
    if not plan.from_codes and any(config.tensor_options_of(paths)[0].wgrad for paths in read or [()]):
        yield f"no weight gradient is formed in fp8: {_first_reason(plan, finding)}"
    low_rank_gradients = {g.parameter for g in plan.low_rank_gradients}
    if low_rank_gradients:
        held, whole = _numbers(plan)
        yield f"{len(low_rank_gradients)} weight gradients stay in their factors: {held} numbers in place of {whole}"
    dense = sorted({path for d in plan.projections for path in d.parameters} - low_rank_gradients)
    if dense and config.keeps_low_rank_gradients:
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        yield (
            f"the gradients of {', '.join(dense[:3])}{more} are projected but dense: a gradient stays in factors where it is "
            "a projected contraction in the parameter's own axes, or a sum of some through one basis"
        )
    returned = sum(s.nbytes for s in cuts.exact.saved if s.user_visible)
    if returned and not deferred:
        yield (
            f"{returned} of the saved bytes are storage that the model also returns (logits): return only the loss to let "
            "the backward free them"
        )
    if cuts.final.kept_input_bytes:
        yield (
            f"{cuts.final.kept_input_bytes} bytes of activations that another region computed are read by this region's "
            "backward, too; as inputs they are not counted above"
        )


def missing_rules(joint: Joint, sites: Iterable[SiteRow]) -> Iterator[str]:
    """A note on torch's own operators that no analysis knows, where they make or read what is saved in floating point."""
    made = {n.name: n.all_input_nodes[0] if n.target is operator.getitem else n for n in joint.gm.graph.nodes}
    calls = (n for n in made.values() if builtin_name(n) and not rule_of(n).known)
    unknown = {str(n.target) for n in calls if torch.Tag.nondeterministic_seeded not in n.target.tags}
    saved = [s for s in sites if s.form in ("save", "quantize") and "float" in s.dtype]
    beside = {str(made[s.name].target) for s in saved if s.name in made}
    beside |= {u.op for s in saved for u in s.uses if u.kind == "nonlinear"}
    names = sorted(unknown & beside)
    if names:
        yield (
            f"no rule for {', '.join(names)} (actpass/ir/op_rules.py): what is read there is stored as for a nonlinear "
            "operator, and what comes out of it is not recomputed"
        )


def _numbers(plan: Plan) -> tuple[int, int]:
    """Of the gradients that stay in factors: coefficients, and what the dense ones would have."""
    held = whole = 0
    for g in plan.low_rank_gradients:
        d = next(d for d in plan.projections if d.site == g.site and g.parameter in d.parameters)
        held += math.prod(g.shape)
        whole += math.prod(g.shape) // (d.rank or d.width) * d.width
    return held, whole


def _first_reason(plan: Plan, finding: WeightGradientMatmuls) -> str:
    if plan.decisions:
        return plan.decisions[0].reason
    if finding.rejected:
        return finding.rejected[0][2]
    return "the region has no weight gradient that is a matmul"

"""Every private torch name that actpass uses, in one place.

Checked on torch 2.11 (source, and on a GPU), 2.13, 2.14 and 2.15 (run). A test forbids ``torch._*`` imports in any other file.
What each name is for stands beside it, so that a torch upgrade is one file to read.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# Much of torch has no types: this file says them, for the whole package.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import sympy  # what torch's symbolic sizes are made of
import torch
import torch._dynamo as dynamo  # explain(): a fresh compile that leaves the user's own alone
import torch._functorch.config as _functorch_config  # `ban_recompute_materialized_backward`, `activation_memory_budget`
import torch._inductor.config as _inductor_config  # `custom_partitioner_fn`, the keyed way into the joint graph
from torch._C._dynamo.eval_frame import reset_code  # compile a region again, under another plan, and no other
from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # whether a code has as many graphs as Dynamo makes
from torch._dynamo.exc import (
    BackendCompilerFailed,  # what Dynamo makes of a backend's error
    RestartAnalysis,  # Dynamo's control flow: no error of a backend
)
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX  # names of the code behind a graph break
from torch._dynamo.source import ConstantSource  # a state input that Dynamo never saw needs a source
from torch._dynamo.symbolic_convert import tls as _tls  # which code is being compiled
from torch._functorch import compile_utils as _compile_utils  # `fx_graph_cse`: q/k/v each carry an own cast of one tensor
from torch._functorch.partitioners import (
    get_default_op_list,  # which operators the min-cut may recompute, and which are views
    min_cut_rematerialization_partition,  # the cut itself; used, never forked
)
from torch._guards import (
    CompileContext,  # which frame is being compiled: a recompilation supersedes
    Guard,  # what Dynamo checks before it runs a graph again
    TracingContext,  # the compilation that is under way, and its guards
    detect_fake_mode,  # the fake mode in which the joint graph's values live
)
from torch._higher_order_ops import invoke_subgraph  # a function that Inductor compiles once and the graph calls often
from torch._higher_order_ops.auto_functionalize import auto_functionalized  # an operator that writes, as one that does not
from torch._higher_order_ops.wrap import tag_activation_checkpoint  # a user's checkpoint, as Dynamo's graph has it
from torch._inductor import (
    inductor_prims,  # random numbers, as Inductor draws them in its graphs
    list_mode_options,  # mode="reduce-overhead" -> Inductor options
)
from torch._inductor.codecache import cache_dir as inductor_cache_dir  # records live beside Inductor's own cache
from torch._inductor.compile_fx import compile_fx  # Inductor
from torch._inductor.custom_graph_pass import CustomPartitionerFn  # picklable, so the caches key on it
from torch._inductor.decomposition import select_decomp_table  # codecs are traced with Inductor's own table
from torch._inductor.utils import (
    needs_fallback_due_to_atomic_add_limitations,  # whether a sum at indices is a loop
    run_and_get_code,  # tests read the generated code
)
from torch._logging._internal import trace_structured  # artifacts that tlparse shows
from torch._ops import HigherOrderOperator, OpOverload  # an operator's namespace tells torch's own from a user's
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module  # Python code only where it is run
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
    statically_known_true,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as _distributed  # `_find_tensors`: where DDP looks for tensors in an output
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper  # a tensor that is made of others
from torch.utils._sympy.value_ranges import ValueRanges

try:
    from torch._inductor.custom_graph_pass import CustomKnapsackSolver  # pyright: ignore[reportAssignmentType]
except ImportError:

    class CustomKnapsackSolver:
        """The partitioner asks it what to run again; torch 2.11 asks any callable."""


__all__ = [
    "FUSION_GATE",
    "REGION_BUDGET",
    "TESTED_TORCH",
    "BackendCompilerFailed",
    "ConstantSource",
    "CustomKnapsackSolver",
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "RestartAnalysis",
    "Sizes",
    "active_ddp",
    "after_backward",
    "arguments_of",
    "auto_functionalized",
    "averages_otherwise",
    "can_be_guarded",
    "checkpoint_function",
    "checkpointed",
    "cholesky_ex",
    "compile_fx",
    "current_code",
    "current_frame",
    "detect_fake_mode",
    "dynamo",
    "eigh",
    "fake_input",
    "fake_of",
    "find_tensors",
    "forked_rng",
    "functorch_config",
    "fusion_gate",
    "fusion_gate_growth",
    "fusion_gate_limit",
    "gathered",
    "get_default_op_list",
    "get_default_store",
    "guard_each_call",
    "has_all_graphs",
    "has_fixed_shape",
    "in_backward",
    "inductor_cache_dir",
    "inductor_config",
    "inductor_prims",
    "invoke_subgraph",
    "is_bucketed",
    "is_joined",
    "is_part_of_a_step",
    "is_piece_of_ddp",
    "is_tangent_input",
    "is_wrapper",
    "let_load",
    "list_mode_options",
    "loop_limits",
    "make_graph_module",
    "merge_duplicates",
    "min_cut_rematerialization_partition",
    "module_in",
    "needs_fallback_due_to_atomic_add_limitations",
    "pinv",
    "plain_input_index",
    "process_group",
    "qr",
    "queue_after_backward",
    "rename",
    "reset_code",
    "returns_to_a_graph_break",
    "run_and_get_code",
    "running_modules",
    "select_decomp_table",
    "sharded_units",
    "size_hint",
    "sizes_as_planned",
    "solve_triangular",
    "split",
    "stand_ins",
    "storage_key",
    "symbol_of",
    "tag_activation_checkpoint",
    "take_out_of_buckets",
    "to_list",
    "torch_is_tested",
    "trace_structured",
    "uncompiled",
    "unflatten",
    "vector_norm",
    "went_through_inductor",
    "written_input",
]

# each builds itself when it is imported: what is in it, no type says
functorch_config: Any = _functorch_config
inductor_config: Any = _inductor_config
P = ParamSpec("P")
R = TypeVar("R")

TESTED_TORCH = ("2.11", "2.15")
"""First and last torch minor version that the tests ran on."""
REGION_BUDGET = "_region_activation_memory_budget"
"""The key in a node's ``meta["custom"]`` of what `torch.autograd.graph.region_activation_memory_budget` asks for (2.13 and
2.15; 2.11 has no such thing)."""


def torch_is_tested(version: str = torch.__version__) -> bool:
    """Whether ``version`` lies inside the tested range (minor versions compared, build tags ignored)."""

    def minor(v: str) -> tuple[int, int]:
        major, minor_, *_ = v.split("+")[0].split(".")
        return int(major), int(minor_)

    return minor(TESTED_TORCH[0]) <= minor(version) <= minor(TESTED_TORCH[1])


def merge_duplicates(graph: torch.fx.Graph, apart: Callable[[torch.fx.Node], bool]) -> torch.fx.Graph:
    """``graph`` with one node in place of several that compute the same. apart: a node is merged with its like alone (from
    2.14 on; before, there is no such choice, and the partitioner merges as much)."""
    cse = cast(Any, _compile_utils.fx_graph_cse)
    if "extra_node_key" in inspect.signature(cse).parameters:
        return cse(graph, extra_node_key=apart)
    return cse(graph)


def guard_each_call(inputs: Sequence[torch.fx.Node], check: Callable[..., bool]) -> None:
    """Have Dynamo ask ``check``, given the values of ``inputs`` (placeholders of the graph that it compiles), before each later
    call. Where it says no, Dynamo compiles anew. Whatever it says, the other guards hold by then."""
    sources: list[Any] = [cast(Any, node)._dynamo_source for node in inputs]
    code = f"___actpass_check({', '.join(map(_expression, sources))})"

    def create(builder: Any, _: Guard) -> None:
        builder.add_python_lambda_leaf_guard_to_root([code], [code], {"___actpass_check": check})

    TracingContext.get().guards_context.dynamo_guards.add(Guard(sources[0], create))


def can_be_guarded(placeholder: torch.fx.Node) -> bool:
    """Whether Dynamo compiles a graph now, and knows where this placeholder of it comes from: an expression in its locals and
    globals alone."""
    source = getattr(placeholder, "_dynamo_source", None)
    return TracingContext.try_get() is not None and source is not None and "___" not in _expression(source)


def _expression(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


def current_frame() -> int | None:
    """Dynamo's number of the frame that is being compiled; the same for its recompilations."""
    compile_id = CompileContext.current_compile_id()
    return compile_id.frame_id if compile_id is not None else None


def current_code() -> types.CodeType | None:
    """The Python code that is being compiled: `reset_code` of it forgets what was compiled, and it is compiled again when it is
    next called."""
    translator = getattr(_tls, "current_tx", None)
    return translator.f_code if translator is not None else None


def has_all_graphs(code: types.CodeType) -> bool:
    """Whether Dynamo has compiled ``code`` as often as it does: what fits none of the graphs runs uncompiled from then on."""
    return len(_debug_get_cache_entry_list(code)) >= dynamo.config.recompile_limit


def is_part_of_a_step(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph break ended or began the region."""
    reason, code = getattr(gm, "compile_subgraph_reason", None), current_code()
    resumed = code is not None and code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)
    return resumed or (reason is not None and reason.graph_break)


def running_modules() -> list[torch.nn.Module]:
    """The modules in whose forward this thread is."""
    found: list[torch.nn.Module] = []
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.nn.Module._wrapped_call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


def is_piece_of_ddp(gm: torch.fx.GraphModule) -> bool:
    """Whether DDP has split a graph, of which this is a piece."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.reason.startswith("DDPOptimizer intentional graph-break")


def returns_to_a_graph_break(gm: torch.fx.GraphModule) -> bool:
    """Whether what the region returns is what a graph break passes on. Not known of the pieces that DDP splits a graph into."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.graph_break and not is_piece_of_ddp(gm)


def gathered() -> set[int]:
    """Ids of what FSDP2 runs forwards with in place of parameters, of all modules (`stand_ins`)."""
    return {id(p) for module in _sharded_modules() for p in stand_ins(module).values()}


def _sharded_modules() -> list[torch.nn.Module]:
    try:
        from torch.distributed._composable_state import _module_state_mapping  # 2.11 to 2.15
    except ImportError:  # a torch without distributed
        return []
    return list(_module_state_mapping)


@dataclass(frozen=True, slots=True)
class ShardedUnit:
    """The parameters of one ``fully_shard`` call. shards: this rank's pieces. whole: ids of what a forward runs with in place
    of them. nbytes: of that. stays: whether it stays whole from the forward to the end of the backward."""

    shards: tuple[torch.nn.Parameter, ...]
    whole: frozenset[int]
    nbytes: int
    stays: bool


def sharded_units(parameters: Collection[int]) -> list[ShardedUnit]:
    """All units of the models under FSDP2 that run with any of ``parameters``, ids of stand-ins."""
    contexts: dict[int, Any] = {}
    for module in _sharded_modules():
        if any(id(p) in parameters for p in stand_ins(module).values()):
            context = cast(Any, module)._get_fsdp_state()._state_ctx
            contexts[id(context)] = context
    return [_unit(group) for c in contexts.values() for state in c.all_states for group in _groups(state)]


def _unit(group: Any) -> ShardedUnit:
    own = group.fsdp_params
    return ShardedUnit(
        shards=tuple(p.sharded_param for p in own),
        whole=frozenset(id(p._unsharded_param) for p in own if hasattr(p, "_unsharded_param")),
        nbytes=sum(p._orig_size.numel() * (p.param_dtype or p.orig_dtype).itemsize for p in own),
        stays=group.post_forward_mesh_info is None,
    )


def _groups(state: Any) -> list[Any]:
    return getattr(state, "_fsdp_param_groups", None) or [g for g in (state._fsdp_param_group,) if g is not None]  # 2.11


def in_backward() -> bool:
    """Whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the backward that this thread runs is done; now, if it runs none. What it raises comes out of
    ``backward()``."""
    if in_backward():
        queue_after_backward(function)
    else:
        function()


def rename(node: torch.fx.Node, name: str) -> None:
    """Give ``node`` a name that no other of its graph has, ``name`` if it is free."""
    node._rename(name)


def make_graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """``graph`` as a module with the submodules of ``root``."""
    return _make_graph_module(root, graph)


def keep_names(copy: torch.fx.Graph, graph: torch.fx.Graph) -> None:
    """Let nodes that are inserted in ``copy`` get the names that they would get in ``graph``, of which it is a copy."""
    names, like = copy._graph_namespace, graph._graph_namespace
    names._used_names, names._base_count = set(like._used_names), like._base_count.copy()


def plain_input_index(desc: Any) -> int | None:
    """The position in Dynamo's argument list that a joint-graph placeholder (or the gradient of it) stands for.

    ``desc`` is ``node.meta["desc"]``: ``PlainAOTInput(idx)`` for a tensor that entered as it is,
    ``GradAOTOutput(grad_of=PlainAOTInput(idx))`` for its gradient, ``SubclassGetAttrAOTInput(base=...)`` for
    a piece of a tensor subclass (DTensor). ``None`` where it is none of them.
    """
    for attribute in ("grad_of", "base"):
        while hasattr(desc, attribute):
            desc = getattr(desc, attribute)
    idx = getattr(desc, "idx", None)
    return idx if type(desc).__name__ == "PlainAOTInput" else None


def is_tangent_input(desc: Any) -> bool | None:
    """Whether a joint-graph placeholder with ``desc`` is the gradient of an output (``TangentAOTInput``, or a piece of a tensor
    subclass that is one); None where nothing is said of it."""
    while hasattr(desc, "base"):
        desc = desc.base
    return None if desc is None else type(desc).__name__ == "TangentAOTInput"


def written_input(desc: Any) -> int | None:
    """The position in Dynamo's argument list of the input whose new value a forward output is, which the caller writes into it;
    None for any other output. desc: ``InputMutationAOTOutput(mutated_input=PlainAOTInput(idx))`` (2.13 and 2.15, run)."""
    return plain_input_index(getattr(desc, "mutated_input", None))


def fake_input(mode: FakeTensorMode, real: torch.Tensor, source: Any, *, most: int | None = None) -> torch.Tensor:
    """The fake tensor of a graph's new input. most: its length may change from call to call, from two to this many. (Without
    bounds Inductor's kernels on CUDA would guard on it, and Dynamo knows no input that this length is of.)"""
    if most is None:
        return mode.from_tensor(real, static_shapes=True)
    symbolic = cast(Any, StatelessSymbolicContext)
    context = symbolic(
        dynamic_sizes=[DimDynamic.DYNAMIC] * real.dim(),
        constraint_sizes=[StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(2, most))] * real.dim(),
    )
    return mode.from_tensor(real, source=source, symbolic_context=context)


Sizes = tuple[tuple[str, int], ...]
"""Symbolic sizes by the names of their symbols, and what to take them for."""
_planned_sizes: ContextVar[Sizes] = ContextVar("actpass_planned_sizes", default=())


@contextlib.contextmanager
def sizes_as_planned(sizes: Sizes) -> Generator[None, None, None]:
    """`size_hint` takes symbols for ``sizes`` inside, in place of what was traced."""
    token = _planned_sizes.set(sizes)
    try:
        yield
    finally:
        _planned_sizes.reset(token)


def symbol_of(size: torch.SymInt) -> tuple[str, int, int] | None:
    """The name of the symbol that ``size`` is, what was traced, and the most that it can be; None for an expression."""
    node: Any = size.node
    expr = node.expr
    if not expr.is_Symbol:
        return None
    most = node.shape_env.var_to_range[expr].upper
    return expr.name, size_hint(size), int(most) if most.is_Integer else 2**62


@functools.lru_cache(maxsize=2**14)
def _at(expr: Any, sizes: Sizes) -> int | None:
    taken = dict(sizes)
    found = expr.xreplace({s: sympy.Integer(taken[s.name]) for s in expr.free_symbols if s.name in taken})
    return int(found) if found.is_number else None


def size_hint(value: int | torch.SymInt) -> int:
    """A symbolic size at the shape that was traced, or that is planned for."""
    if isinstance(value, int):
        return value
    sizes = _planned_sizes.get()
    if sizes and (planned := _at(value.node.expr, sizes)) is not None:
        return planned
    hint = value.node.hint
    return int(hint) if hint is not None else 1


def is_same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are one whatever symbols stand for; asked so that nothing is assumed of them."""
    return statically_known_true(a == b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else a == b


def is_data_dependent(size: int | torch.SymInt) -> bool:
    """Whether a symbolic size is known only once the graph has run."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def went_through_inductor(error: BaseException) -> bool:
    """Whether ``error`` was raised while Inductor ran, of which the pass is a part."""
    package = os.path.dirname(str(inductor_config.__file__))
    return any(f.filename.startswith(package) for f in traceback.extract_tb(error.__traceback__))


def loop_limits(*, on_cpu: bool) -> tuple[int, int]:
    """How many tensors a loop may read, and of how many operators it may consist, before Inductor writes its value to memory.
    Each is the user's; or else a CPU's own, where this torch has one (from 2.13 on); or else the default."""
    limits: list[int] = []
    for what in ("acc_reads", "opcount"):
        names = (f"realize_{what}_threshold", f"realize_cpu_{what}_threshold", f"_realize_{what}_threshold_default")
        asked = [getattr(inductor_config, name, None) for name in names if on_cpu or "cpu" not in name]
        limits.append(next(limit for limit in asked if limit is not None))
    return limits[0], limits[1]


FUSION_GATE = ("fusion_memory_timeline_peak_memory_increase_gb", "fusion_memory_timeline_peak_memory_pct_threshold")
"""Inductor's options (torch 2.15) of what fusions may add to a graph's peak: in GiB, and as a fraction. The less counts."""


def fusion_gate(growth: float | None) -> dict[str, float]:
    """The option by which fusions add no more than ``growth`` of a graph's peak; none where Inductor has no such gate or the
    user has set one."""
    if growth is None or not all(hasattr(inductor_config, name) for name in FUSION_GATE):
        return {}
    return {} if fusion_gate_limit() is not None else {FUSION_GATE[1]: growth}


def fusion_gate_growth() -> float | None:
    """As Inductor is told now."""
    return getattr(inductor_config, FUSION_GATE[1], None)


def fusion_gate_limit() -> Callable[[int], int] | None:
    """From the peak of a graph before any fusion to that which fusions may lift it to; None: Inductor asks for no memory, or
    has no such gate (before torch 2.15)."""
    gib, share = (getattr(inductor_config, name, None) for name in FUSION_GATE)
    if gib is None and share is None:
        return None
    most, part = (float("inf") if x is None else x for x in (gib, share))
    return lambda peak: peak + int(min(most * 2**30, part * peak))


def get_default_store() -> Any:
    """The process group's, through which ranks compare plans (2.11 to 2.15)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def find_tensors(output: Any) -> Iterable[torch.Tensor]:
    """Where DDP looks for tensors in what a forward returned."""
    return cast(Any, _distributed._find_tensors)(output)


def active_ddp() -> DistributedDataParallel | None:
    """The DDP whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module()


def module_in(parallel: Any) -> torch.nn.Module:
    """What DDP or DataParallel wraps."""
    return parallel.module


def process_group(ddp: DistributedDataParallel) -> Any:
    """Of the ranks that average."""
    group = cast(Any, ddp.process_group)
    assert group is not None
    return group


def queue_after_backward(function: Callable[[], None]) -> None:
    """Called inside a backward: run ``function`` at its end, as DDP and FSDP2 do with what they await. Public from 2.15 on."""
    public = getattr(torch.autograd.graph, "queue_callback", None)
    engine: Any = torch.autograd.Variable._execution_engine
    (public or engine.queue_callback)(function)


def stand_ins(module: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """What FSDP2 runs a forward with in place of the parameters of ``module`` itself (not of modules inside that are sharded
    by themselves), by the parameter's id; of those that it has gathered before. They last as long as the parameters."""
    get: Any = getattr(module, "_get_fsdp_state", None)
    if get is None:
        return {}
    of = [p for group in _groups(get()) for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    return {id(p.sharded_param): p._unsharded_param for p in of}


def is_bucketed(parameter: torch.Tensor) -> bool:
    """Whether DDP copies its gradient into a bucket, if it is one of a DDP's."""
    return parameter.requires_grad and not hasattr(parameter, "_ddp_ignored")


def averages_otherwise(ddp: DistributedDataParallel) -> str | None:
    """What ``ddp`` does that goes with buckets only."""
    if ddp.mixed_precision is not None:
        return f"mixed_precision={ddp.mixed_precision}, which casts parameters and gradients. Use torch.autocast"
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()):
        return "an optimizer that steps in the backward, before the ranks have averaged. Step it after the backward"
    return None


def is_joined(ddp: DistributedDataParallel) -> bool:
    """Whether it runs inside ``ddp.join()``."""
    return ddp._join_config.enable


def take_out_of_buckets(ddp: Any, names: Iterable[str]) -> None:
    """Build the reducer of ``ddp`` again, without the parameters ``names``, from the calls by which DDP makes it when it is
    unpickled. Communication hooks are registered again, and so is that the caller finalizes the backward (2.15). Checked in the
    source of 2.11, 2.13 and 2.15."""
    ddp.parameters_to_ignore |= {
        form for name in names for form in (name, f".{name}")
    }  # DDP's name of a root's own begins with a dot
    for name, parameter in ddp.module.named_parameters(remove_duplicate=False):
        if name in ddp.parameters_to_ignore:
            parameter._ddp_ignored = True
    parameters, sparse = ddp._build_params_for_reducer()
    ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if getattr(ddp, "require_manual_backward_finalization", False):
        ddp.require_manual_backward_finalization = True  # a property of 2.15
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        cast(Any, torch.distributed._register_comm_hook)(ddp.reducer, state, hook)


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same for all tensors that share ``storage``, while it lives."""
    return storage._cdata


def arguments_of(operator: Any) -> Sequence[torch.Argument]:
    """The arguments in the schema of ``operator``, an `OpOverload`."""
    return operator._schema.arguments


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` as Python runs it: Dynamo compiles neither it nor what it calls."""
    return cast(Any, torch.compiler.disable)(function)


def fake_of(operator: torch.library.CustomOpDef) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``operator.register_fake``."""
    return cast(Any, operator.register_fake)


def let_load(function: Callable[..., Any]) -> None:
    """Let ``torch.load(weights_only=True)`` call ``function``."""
    torch.serialization.add_safe_globals([function])


def checkpoint_function() -> Callable[..., Any]:
    """`torch.utils.checkpoint.checkpoint`, not reentrant, as a model's code calls it: Dynamo traces through no function of
    ours."""
    return functools.partial(cast(Any, checkpoint.checkpoint), use_reentrant=False)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`, not reentrant."""
    return cast(Any, checkpoint.checkpoint)(function, *args, use_reentrant=False)


def forked_rng(devices: Sequence[int] | None = None) -> contextlib.AbstractContextManager[None]:
    """`torch.random.fork_rng`: random state is put back at the end. devices: CUDA's; None: all."""
    return cast(Any, torch.random.fork_rng)(devices)


def unflatten(x: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    return cast(torch.Tensor, x.unflatten(axis, sizes))


def split(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """``x`` in parts of ``sizes`` along its first axis."""
    return cast(tuple[torch.Tensor, ...], x.split(sizes))


def has_fixed_shape(x: torch.Tensor) -> bool:
    """Whether no size of ``x`` is symbolic."""
    return all(isinstance(s, int) for s in cast(Sequence[Any], x.shape))


def to_list(x: torch.Tensor) -> list[Any]:
    """`torch.Tensor.tolist` of a tensor with an axis at least."""
    return cast(list[Any], x.tolist())


_linalg: Any = torch.linalg  # has no types at all


def eigh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors."""
    return _linalg.eigh(x)


def qr(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _linalg.qr(x)


def cholesky_ex(x: torch.Tensor, *, upper: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor, and for each matrix 0 if it has one."""
    return _linalg.cholesky_ex(x, upper=upper)


def solve_triangular(a: torch.Tensor, b: torch.Tensor, *, upper: bool, left: bool) -> torch.Tensor:
    return _linalg.solve_triangular(a, b, upper=upper, left=left)


def pinv(x: torch.Tensor) -> torch.Tensor:
    return _linalg.pinv(x)


def vector_norm(
    x: torch.Tensor, order: float = 2, *, dim: int | None = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _linalg.vector_norm(x, order, dim, keepdim, dtype=dtype)


def records_dir() -> str:
    """Where compile records are kept: inside Inductor's cache directory, so that clearing one clears both."""
    return os.path.join(inductor_cache_dir(), "actpass")

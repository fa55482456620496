"""What a model's training step saves for backward, and the graphs behind it, stage by stage. Nothing is trained.

    python tools/inspect_graph.py llama-mini                                  what actpass saves by default
    python tools/inspect_graph.py llama-1b --off --batch 128                  what Inductor saves; takes no memory
    python tools/inspect_graph.py config.json --projection haar --rank 0.25 --override lm_head=save --graphs graphs
    python tools/inspect_graph.py llama-60m --plot-peak peak.svg --plot-pareto pareto.svg    the same as pictures
    python tools/inspect_graph.py llama-mini --memory-budget 0.3 --save-plan plan.json      the plan as a file, to edit ...
    python tools/inspect_graph.py llama-mini --plan plan.json                 ... and what is then saved
    python tools/inspect_graph.py llama-mini --pass quantize_saved            the graphs before and after one pass, or all
    python tools/inspect_graph.py --list                                      the passes
    python tools/inspect_graph.py my_module:make_training_step --device cpu   any model: a function that returns
                                                                              (model, args, kwargs)

With ``--device meta`` (the default) the tensors are fake: shapes without storage, on CUDA if there is a device, else on
the CPU, so that the graph is the one that a real step runs (on torch's own meta device Dynamo breaks HF models up).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from arguments import add_option_arguments, options_from, positive_int, probability
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from workloads import (
    DTYPES,
    HEADS,
    WORKLOADS,
    UsageError,
    Workload,
    build_config,
    build_model,
    make_batch,
    workload_from_file,
    workload_named,
)

from actpass.diagnostics.explain import Explanation, explain_model
from actpass.errors import ActpassError
from actpass.pipeline import PASSES
from actpass.reporting.plots import check_path

ALL = "all"


@dataclass(frozen=True, slots=True)
class Target:
    """A model and one training batch. title: what it is, in a line."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    title: str


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    try:
        options = options_from(given)
        for path in (given.plot_peak, given.plot_pareto):
            if path is not None:
                check_path(path)
        explained = _explain_with_fallback(given, options)
    except (UsageError, ActpassError) as error:
        parser.error(str(error))
    print(explained.report)
    if given.json is not None:
        _write(given.json, json.dumps(explained.report.to_dict(), indent=1) + "\n")
    if given.save_plan is not None:
        explained.report.plan.save(given.save_plan)
        print(f"wrote {given.save_plan}: plan {explained.report.plan_hash}")
    if given.only is not None:
        print("\n".join(pass_lines(explained, given.only)))
    if given.graphs is not None:
        for name, text in graph_files(explained):
            _write(given.graphs / name, text)
    try:
        _draw(given, explained)
    except ActpassError as error:
        parser.error(str(error))
    return 0


def _draw(given: argparse.Namespace, explained: Explanation) -> None:
    for path, draw in ((given.plot_peak, explained.report.plot_peak), (given.plot_pareto, explained.report.plot_pareto)):
        if path is not None:
            draw(path)
            print(f"wrote {path} and {path.with_suffix('.csv')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(WORKLOADS)}; a transformers config (JSON); module:function")
    parser.add_argument("--head", choices=HEADS, help="task of a config (default: the config's architectures say it)")
    parser.add_argument("--batch", type=positive_int, help="sequences in a step (default: the model's usual)")
    parser.add_argument("--seq", type=positive_int, help="tokens in a sequence (default: the model's usual)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")
    parser.add_argument("--autocast", action="store_true", help="forward under bfloat16 autocast")
    parser.add_argument("--dropout", type=probability, help="replaces the config's dropout probabilities")
    parser.add_argument("--device", choices=("meta", "cpu", "cuda"), default="meta")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--save-plan", type=Path, metavar="FILE", help="write the plan, to edit and to compile with")
    parser.add_argument(
        "--graphs", type=Path, metavar="DIR", help="write every region's graphs, a file for each that a pass made"
    )
    parser.add_argument(
        "--pass", dest="only", choices=(*(p.name for p in PASSES), ALL), help="print what it is given and makes"
    )
    parser.add_argument("--list", action=ListPasses, nargs=0, help="print the passes in their order, and stop")
    parser.add_argument("--plot-peak", type=Path, metavar="FILE", help="draw memory over a step (.svg or .png)")
    parser.add_argument(
        "--plot-pareto", type=Path, metavar="FILE", help="draw saved bytes against error and time (.svg or .png); takes longer"
    )
    add_option_arguments(parser)
    return parser


class ListPasses(argparse.Action):
    """Prints the passes: the first line of what each one's file says."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for each in PASSES:
            first_line, _, _ = (sys.modules[type(each).__module__].__doc__ or "").partition("\n")
            print(f"{each.name:25} {first_line}")
        parser.exit()


def _explain_with_fallback(given: argparse.Namespace, options: Mapping[str, Any]) -> Explanation:
    """Explain on the device asked for; what can't be traced with fake tensors is traced with real ones."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device. Allowed here: meta, cpu.")
    if given.device != "meta":
        return explain(given, options, given.device, fake=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return explain(given, options, device, fake=True)
    except (UsageError, ActpassError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
        print(f"not traceable without memory ({reason}); tracing with real tensors on {device}", file=sys.stderr)
        torch.compiler.reset()
        return explain(given, options, device, fake=False)


def explain(given: argparse.Namespace, options: Mapping[str, Any], device: str, fake: bool) -> Explanation:
    """Build the model and run the pass on it. Raises `UsageError` or `ActpassError` for what the user can mend."""
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        with torch.device(device):
            target = load_target(given, device)
        count = sum(p.numel() for p in target.model.parameters())
        how = f"fake {device} tensors" if fake else device
        stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=given.autocast))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
        explore = given.plot_pareto is not None
        explained = explain_model(target.model, target.args, target.kwargs, options, explore=explore)
        print(f"{target.title}, {count / 1e6:.1f} M parameters, traced with {how}, options {options or 'default'}")
        return explained


def load_target(given: argparse.Namespace, device: str) -> Target:
    """What the positional argument names."""
    if ":" in given.model and not Path(given.model).exists():
        return _from_function(given)
    return _from_workload(given, device)


def _from_workload(given: argparse.Namespace, device: str) -> Target:
    workload = _workload(given)
    batch, seq = workload.shape(device)
    shape = given.batch or batch, given.seq or seq
    config = build_config(workload, shape[1], given.dropout)
    torch.manual_seed(0)
    dtype = given.dtype or "float32"
    model = build_model(config, workload.head, DTYPES[dtype])
    inputs = make_batch(config, workload.head, shape, device, seed=0)
    title = f"{workload.name} ({workload.head}), {shape[0]} x {shape[1]} tokens, {dtype}"
    return Target(model, (), inputs, title + (" under bfloat16 autocast" if given.autocast else ""))


def _workload(given: argparse.Namespace) -> Workload:
    if Path(given.model).exists():
        return workload_from_file(Path(given.model), given.head)
    workload = workload_named(given.model)
    if given.head not in (None, workload.head):
        raise UsageError(f"--head {given.head}: {workload.name} is a {workload.head} model. Give a config (JSON) instead.")
    return workload


def _from_function(given: argparse.Namespace) -> Target:
    for name in ("batch", "seq", "head", "dropout", "dtype"):
        if getattr(given, name) is not None:
            raise UsageError(f"--{name} has no meaning for {given.model!r}: the function decides it.")
    module_name, _, function_name = given.model.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model {given.model!r} (module:function) cannot be imported: {error}.") from error
    finally:
        sys.path.pop(0)
    found = function()
    if not (isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], torch.nn.Module)):
        raise UsageError(f"{given.model!r} must return (model, args, kwargs) with a torch.nn.Module, not {found!r:.100}.")
    model, args, kwargs = found
    return Target(model, tuple(args), dict(kwargs), given.model)


def pass_lines(explained: Explanation, only: str) -> Iterator[str]:
    """The graphs before and after the pass ``only``, or each one, and how long it took."""
    for number, region in enumerate(explained.regions):
        for before, after in pairwise(region.stages):
            if only not in (after.name, ALL):
                continue
            changed = list(before.graphs.values()) != list(after.graphs.values())
            says = "" if changed else ": nothing to do"
            yield f"# region {number}, {after.name}, {after.seconds:.3f} s{says}"
            for when, stage in (("before", before), ("after", after)) if changed else ():
                for kind, gm in stage.graphs.items():
                    yield f"# {when}: {kind} graph, {len(gm.graph.nodes)} nodes\n{_text(gm)}"


def graph_files(explained: Explanation) -> Iterator[tuple[str, str]]:
    """(file name, text) of what each pass made of every region, in their order."""
    for number, region in enumerate(explained.regions):
        known: list[fx.GraphModule] = []
        for position, stage in enumerate(region.stages):
            for kind, gm in stage.graphs.items():
                if gm not in known:
                    head = f"# region {number}, {kind} graph after {stage.name}, {len(gm.graph.nodes)} nodes\n"
                    yield f"region{number}_{position:02}_{stage.name}_{kind}.py.txt", f"{head}{_text(gm)}\n"
                    known.append(gm)


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.exit(f"{path}: cannot be written: {error.strerror}")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

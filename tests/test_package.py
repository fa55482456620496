"""The package as a package: private names in one file, no import cycle, the entry point, what lies where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import fx

import actpass
from actpass.torch_compat import merge_duplicates, torch_is_tested

PACKAGE = Path(actpass.__file__).parent


def modules() -> dict[str, Path]:
    files = {p: ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in files.items()}


def imports(path: Path) -> list[str]:
    """Modules that a file imports when it is imported: not those inside functions."""
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found: list[str] = []
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return found


def test_private_torch_names_are_imported_in_one_file_only():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            private = [n for n in names if n.startswith("torch._")]
            assert not private or name == "actpass.torch_compat", f"{name} imports {private}"


@pytest.mark.slow
def test_import_graph_has_no_cycle():
    known = modules()
    edges = {name: {i for i in imports(path) if i in known and i != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name]):
                if not name.startswith(f"{target}."):  # a package's __init__ is being imported already
                    visit(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


STAGES = [
    "errors", "registry", "_format", "torch_compat", "codecs", "low_rank_gradient", "ir", "memory", "plan", "analysis",
    "plan_file", "options", "passes", "planner", "reporting", "pipeline", "runtime", "backend", "optim", "diagnostics",
    "extrapolation", "distributed", "api", "integrations",
]  # fmt: skip
"""What lies in the package, from below: each imports only from those before it. See docs/architecture.md."""


def test_each_stage_imports_only_from_those_below_it():
    for name, path in modules().items():
        if name == "actpass":
            continue
        stage = name.split(".")[1]
        for imported in re.findall(r"^ *(?:from|import) (actpass[\w.]*)", path.read_text(), flags=re.MULTILINE):
            below = imported.split(".")[1] if "." in imported else "actpass"
            assert below in (stage, "actpass") or below in STAGES[: STAGES.index(stage)], f"{name} imports {imported}"


def test_nothing_else_lies_beside_the_stages():
    assert {p.stem for p in PACKAGE.iterdir() if p.name != "__pycache__"} - {"__init__"} == set(STAGES)


def test_a_module_is_what_its_path_says():
    """No function of a package has the name of a module in it: ``import a.b as c`` would be the function."""
    for name in modules():
        parent, _, last = name.rpartition(".")
        if parent and name in sys.modules:
            assert getattr(sys.modules[parent], last) is sys.modules[name], name


def test_plan_needs_no_torch_at_run_time():
    code = "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); import plan"
    subprocess.run([sys.executable, "-c", code.replace("import plan", "import types; p = types.ModuleType('actpass'); "
        "p.__path__ = [sys.argv[1]]; sys.modules['actpass'] = p; import actpass.plan"), str(PACKAGE)], check=True)  # fmt: skip


def test_entry_point_makes_the_backend_known_without_an_import():
    (entry,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "actcomp"]
    assert entry.load() is actpass.backend.backend.actcomp


@pytest.mark.parametrize(
    ("version", "tested"),
    [("2.11.0+cu130", True), ("2.13.0+cpu", True), ("2.15.0+cu132", True), ("2.10.1", False), ("2.16.0a0", False)],
)
def test_torch_versions_outside_the_tested_range_are_told_apart(version: str, tested: bool):
    assert torch_is_tested(version) is tested


@pytest.mark.codegen
def test_untested_torch_warns_with_the_versions_that_were_tested(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr("actpass.backend.backend.torch_is_tested", lambda: False)
    model = torch.compile(torch.nn.Linear(4, 4), backend="actcomp")
    with pytest.warns(actpass.ActpassWarning, match=r"tested on torch 2\.11 to 2\.15; this is"):
        model(torch.randn(2, 4))


def test_what_only_the_forward_needs_is_merged_with_nothing_that_gradients_need():
    graph = fx.Graph()
    x = graph.placeholder("x")
    logged, also_logged, needed, also_needed = (graph.call_function(torch.ops.aten.sin.default, (x,)) for _ in range(4))
    graph.output((logged, also_logged, needed, also_needed))
    merged = merge_duplicates(graph, {needed, also_needed}.__contains__)
    first, second, third, fourth = merged.output_node().args[0]
    assert first is second
    assert third is fourth
    assert (first is not third) == (torch.__version__ >= "2.14")

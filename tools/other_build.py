"""Another checkout of this package beside the one under test, in one process: a ratio of two builds is then of one run."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from workloads import UsageError

NAME = "actpass_before"


def load(checkout: Path) -> ModuleType:
    """The package of ``checkout``, imported under another name: a copy in which the package calls itself so."""
    source = checkout / "actpass"
    if not (source / "__init__.py").is_file():
        raise UsageError(f"--against {checkout}: no checkout of this project (it has no actpass/__init__.py). Give its folder.")
    folder = Path(tempfile.mkdtemp(prefix="other-build-"))
    for file in source.rglob("*.py"):
        copy = folder / NAME / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"\bactpass\b", NAME, file.read_text()))
    sys.path.insert(0, str(folder))
    package = importlib.import_module(NAME)
    importlib.import_module(f"{NAME}.backend")
    return package


def loaded() -> ModuleType:
    """What `load` imported. Raises `UsageError` if nothing was."""
    if NAME not in sys.modules:
        raise UsageError("a row before:METHOD needs --against CHECKOUT, the folder of the build that it is of.")
    return sys.modules[NAME]

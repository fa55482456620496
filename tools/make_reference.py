"""Write docs/reference from the package: options from the backend's docstring, the rest from public docstrings.

    python tools/make_reference.py            write docs/reference/{options,api,optim,errors,extending}.md
    python tools/make_reference.py --check    exit with 1 if a page is not what would be written

`tests/test_docs.py` checks it, too.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import actpass
import actpass.codecs
import actpass.memory.profiler
import actpass.optim
import actpass.optim.transforms
import actpass.plan
from actpass import errors
from actpass.backend.backend import actcomp
from actpass.options import parse
from actpass.reporting.record import Record, SiteRow, Totals

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
NOTE = "<!-- Written by tools/make_reference.py from docstrings. Edit those, then run it again. -->"


def options_page() -> str:
    """The options with their values, from the one docstring that defines them for users."""
    text = inspect.getdoc(actcomp) or ""
    _, _, described = text.partition("Options (all optional):")
    listed, _, raised = described.partition("\nRaises ")
    names = known_options()
    return page(
        "Options",
        'Given as `torch.compile(model, backend="actcomp", options={...})`. All are optional. An unknown name or a value out\n'
        "of range raises `OptionError`, which names the value, what is allowed, and the nearest known name.",
        "Known: " + ", ".join(f"`{n}`" for n in names) + ".",
        markdown(listed.strip()),
        markdown(f"Raises {raised.strip()}"),
    )


def known_options() -> list[str]:
    """The names that `options=` takes, as its own error lists them."""
    try:
        parse({"no such option": None})
    except actpass.OptionError as error:
        return str(error).rpartition("Known: ")[2].rstrip(".").split(", ")
    raise AssertionError("an unknown option was accepted")


def api_page() -> str:
    own = [n for n in actpass.__all__ if n not in vars(errors) and callable(getattr(actpass, n))]
    functions = [n for n in own if not inspect.isclass(getattr(actpass, n))]
    classes = [n for n in own if inspect.isclass(getattr(actpass, n))]
    return page(
        "API",
        "Everything here is imported with `import actpass`, where no other module is named.",
        "## Functions",
        *(entry(getattr(actpass, n), f"actpass.{n}") for n in functions),
        entry(actpass.distributed.reduce_low_rank, "actpass.distributed.reduce_low_rank"),
        entry(actpass.memory.profiler.measure, "actpass.memory.profiler.measure"),
        "## Extension points",
        "See [Architecture](../architecture.md#where-to-add-what), and [what they are given](extending.md).",
        *extension_entries(),
        "## Classes",
        *(part for n in classes for part in class_entries(getattr(actpass, n), f"actpass.{n}")),
        *(entry(cls, f"actpass.reporting.{cls.__name__}") for cls in (Totals, Record, SiteRow)),
    )


def extending_page() -> str:
    """What a codec or a policy of another package is, and what it is given."""
    plan = ("Policy", "Facts", "SavedTensor", "Storage", "CodecSet", "TensorRequest")
    classes = {f"actpass.plan.{n}": getattr(actpass.plan, n) for n in plan}
    return page(
        "Extending",
        "The classes of codecs and policies. How they are used: [Extending](../guide/extending.md).",
        *class_entries(actpass.codecs.Quantizer, "actpass.codecs.Quantizer"),
        *(part for n, cls in classes.items() for part in class_entries(cls, n)),
    )


def extension_entries() -> list[str]:
    """Every ``register_...`` function that adds to the package, by the shortest path that leads to it."""
    found: dict[str, str] = {}
    for path in sorted((m for m in sys.modules if m.startswith("actpass.")), key=lambda m: (m.count("."), m)):
        for name, value in vars(sys.modules[path]).items():
            if name.startswith("register_") and value.__module__.startswith("actpass.") and not hasattr(actpass, name):
                found.setdefault(name, entry(value, f"{path}.{name}"))
    return [found[name] for name in sorted(found)]


def optim_page() -> str:
    def is_transform(value: Any) -> bool:
        return inspect.isclass(value) and value.__module__ == "actpass.optim.transforms" and bool(value.__doc__)

    transforms = {n: v for n, v in vars(actpass.optim.transforms).items() if not n.startswith("_") and is_transform(v)}
    return page(
        "Optimizers",
        markdown(inspect.getdoc(actpass.optim) or ""),
        *(entry(v, f"actpass.optim.{n}") for n in actpass.optim.__all__ if callable(v := getattr(actpass.optim, n))),
        "## Transforms",
        markdown(inspect.getdoc(actpass.optim.transforms) or ""),
        *(entry(v, f"actpass.optim.transforms.{n}") for n, v in transforms.items()),
    )


def errors_page() -> str:
    found = [v for v in vars(errors).values() if inspect.isclass(v) and v.__module__ == errors.__name__]
    bases = {e: ", ".join(b.__name__ for b in e.__bases__) for e in found}
    rows = [f"### {e.__name__}({bases[e]})\n\n{markdown(inspect.getdoc(e) or '')}" for e in found]
    return page("Errors", markdown(inspect.getdoc(errors) or ""), *rows)


def class_entries(cls: type, name: str) -> Iterator[str]:
    yield entry(cls, name)
    for attribute, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        is_shown = (inspect.isfunction(function) or isinstance(function, property)) and function.__doc__
        if is_shown and not attribute.startswith("_"):
            yield entry(function, f"{cls.__name__}.{attribute}", level="####")


def entry(value: Any, name: str, level: str = "###") -> str:
    """A heading, the signature, the docstring."""
    shown = "" if isinstance(value, property) else f"```text\n{name.rpartition('.')[2]}{signature(value)}\n```\n\n"
    return f"{level} `{name}`\n\n{shown}{markdown(inspect.getdoc(value) or '')}"


def signature(value: Callable[..., Any]) -> str:
    """Names and defaults, without annotations: those differ between versions of Python."""
    found = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values() if p.name not in ("self", "cls")]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<(?:class|object|function)[^>]*>", "...", text)


def markdown(text: str) -> str:
    """A docstring as Markdown: double backquotes become single ones, and ``::`` opens a block of code."""
    text = re.sub(r"(?<!`)``(?!`)(.+?)(?<!`)``(?!`)", lambda m: f"`{' '.join(m[1].split())}`", text, flags=re.DOTALL)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", NOTE, *(p.strip() for p in parts if p.strip()))) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_page, "api.md": api_page, "optim.md": optim_page, "errors.md": errors_page,
    "extending.md": extending_page,
}  # fmt: skip


def stale() -> Iterable[str]:
    """The pages that are not what the package says now."""
    return [n for n, make in PAGES.items() if not (FOLDER / n).is_file() or (FOLDER / n).read_text(encoding="utf-8") != make()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        old = list(stale())
        sys.exit(f"not up to date: {', '.join(old)}; run python tools/make_reference.py" if old else 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")

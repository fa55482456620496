"""Result tables lie in one place, and its index names them all."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "tools" / "results"


def test_the_index_names_every_table_and_nothing_else():
    there = {str(f.relative_to(RESULTS)) for f in RESULTS.rglob("*") if f.is_file() and f.name != "README.md"}
    named = set(re.findall(r"\]\(([^)]+)\)", (RESULTS / "README.md").read_text()))
    assert named == there

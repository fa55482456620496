"""Bytes saved for backward under many options, read from the partitioned graphs: nothing is compiled or timed.

    python tools/bench_saved.py --workloads llama-60m gpt2-124m roberta-base --dtypes float32 bfloat16 \\
        --rows actcomp:auto actcomp:int4,chunked_loss=false actcomp:auto,memory_budget=0.1 --dropout 0

Every ratio is to Inductor's default cut of the same model: of all that crosses, and without logits. One JSON object a row,
then a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from arguments import positive_int, probability
from bench_counts import count_default, counts_of_report
from bench_rows import failure, parse_row
from bench_tables import Column, finish, header, markdown, megabytes, number, with_ratio
from workloads import DTYPES, UsageError, build_config, build_model, make_batch, workload_named

from actpass.diagnostics.explain import explain_model

ROWS = ("actcomp:exact", "actcomp:auto", "actcomp:int4", "actcomp:int4,chunked_loss=false")
COLUMNS: tuple[Column, ...] = (
    ("row", lambda r: f"`{r['row']}`"),
    ("model", lambda r: r["model"]),
    ("dtype", lambda r: r["dtype"]),
    ("saved MB", with_ratio(megabytes("saved_bytes"), "saved_ratio")),
    ("without logits", number("without_logits_ratio", "{:.4f}")),
    ("matmuls again", number("extra_matmuls", "{}")),
    ("attention again", number("extra_attention", "{}")),
)
NOTES = """\
In brackets and without logits: ratios to Inductor's default cut. Logits: all that is as wide as the vocabulary, and the
gradients that a loss in pieces forms early in its place.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["llama-60m"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--rows", type=parse_row, nargs="+", default=[parse_row(r) for r in ROWS], metavar="actcomp:...")
    parser.add_argument("--batch", type=positive_int)
    parser.add_argument("--seq", type=positive_int)
    parser.add_argument("--dropout", type=probability, help="replaces the config's dropout probabilities")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    given = parser.parse_args()
    if any(spec.kind != "actcomp" for spec in given.rows):
        parser.error("--rows: only actcomp:... rows have a report to read.")
    try:
        results = [r for name in given.workloads for dtype in given.dtypes for r in rows_of(given, name, dtype)]
    except UsageError as error:
        parser.error(str(error))
    head = header(f"{', '.join(given.workloads)}: bytes saved for backward, from the graphs", "cpu")
    finish(given, {**head, "rows": results}, markdown(head, COLUMNS, results, NOTES))
    return 0


def rows_of(given: argparse.Namespace, name: str, dtype: str) -> list[dict[str, Any]]:
    workload = workload_named(name)
    batch, seq = workload.shape("cpu")
    batch, seq = given.batch or batch, given.seq or seq
    config = build_config(workload, seq, given.dropout)
    torch.manual_seed(0)
    model = build_model(config, workload.head, DTYPES[dtype])
    inputs = make_batch(config, workload.head, (batch, seq), "cpu", 0)
    torch.compiler.reset()
    default = count_default(model, inputs, config.vocab_size)
    assert default.saved_bytes_reported is not None
    assert default.logits_bytes is not None
    rows: list[dict[str, Any]] = []
    for spec in given.rows:
        row: dict[str, Any] = {"model": name, "dtype": dtype, "batch": batch, "seq": seq, "row": spec.label, "failed": None}
        torch.compiler.reset()  # Dynamo gives up on what was traced too often
        try:
            counts = counts_of_report(explain_model(model, (), inputs, spec.options).report, config.vocab_size)
        except Exception as error:
            row["failed"] = failure(error)
        else:
            assert counts.saved_bytes_reported is not None
            assert counts.logits_bytes is not None
            without = counts.saved_bytes_reported - counts.logits_bytes
            row |= {
                "saved_bytes": counts.saved_bytes_reported,
                "saved_ratio": counts.saved_bytes_reported / default.saved_bytes_reported,
                "without_logits_ratio": without / (default.saved_bytes_reported - default.logits_bytes),
                "extra_matmuls": counts.extra_matmuls,
                "extra_attention": counts.extra_attention,
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())

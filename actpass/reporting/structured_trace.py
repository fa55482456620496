"""A region's report and plan as artifacts of torch's structured trace, which tlparse shows."""

from __future__ import annotations

from actpass.reporting.record import Record
from actpass.reporting.report import Report
from actpass.torch_compat import trace_structured


def trace(record: Record) -> None:
    """Write the table of ``record`` (``actpass_report``) and its plan (``actpass_plan``, which ``options={"plan": ...}`` reads
    back) to the trace of the compilation that runs. Without ``TORCH_TRACE`` neither is made."""
    report = Report((record,))
    trace_structured("artifact", lambda: {"name": "actpass_report", "encoding": "string"}, payload_fn=report.__str__)
    trace_structured("artifact", lambda: {"name": "actpass_plan", "encoding": "json"}, payload_fn=lambda: report.plan.to_dict())

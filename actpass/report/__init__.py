"""What was saved, in which form, why, and from which line."""

from actpass.report.record import Record, SiteRow
from actpass.report.report import Report

__all__ = ["Record", "Report", "SiteRow"]

"""What was saved, in which form, why, and from which line."""

from actpass.reporting.record import Record, SiteRow
from actpass.reporting.report import Report

__all__ = ["Record", "Report", "SiteRow"]

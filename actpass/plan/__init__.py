"""Sites + options -> Plan. Plain data: no FX, and no torch at run time."""

from actpass.plan.policy import KEPT, PRECISIONS, Precision, choose, choose_storage
from actpass.plan.types import EXPONENTIAL, KEEP, SCORE, SCORE_AGAIN, Candidate, Decision, Plan, SavedTensor, Storage

__all__ = [
    "EXPONENTIAL",
    "KEEP",
    "KEPT",
    "PRECISIONS",
    "SCORE",
    "SCORE_AGAIN",
    "Candidate",
    "Decision",
    "Plan",
    "Precision",
    "SavedTensor",
    "Storage",
    "choose",
    "choose_storage",
]

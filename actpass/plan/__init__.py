"""Sites + options -> Plan. Plain data: no FX, and no torch at run time."""

from actpass.plan.policy import KEPT, choose
from actpass.plan.types import Candidate, Decision, Plan

__all__ = ["KEPT", "Candidate", "Decision", "Plan", "choose"]

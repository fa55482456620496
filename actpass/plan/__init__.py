"""Sites + options -> Plan. Plain data: no FX, and no torch at run time."""

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import (
    EXPONENTIAL,
    RECOMPUTE,
    RECOMPUTED_SCORE,
    SAVE,
    SCORE,
    Candidate,
    Decision,
    FactoredGradient,
    Plan,
    Predicted,
    Role,
    SavedTensor,
    Storage,
)
from actpass.plan.policies import POLICIES, Facts, Policy, choose_storage, register_policy
from actpass.plan.projections import choose, choose_decoded, noise, rank_sites
from actpass.plan.request import KEPT, TensorRequest

__all__ = [
    "EXPONENTIAL",
    "KEPT",
    "POLICIES",
    "RECOMPUTE",
    "RECOMPUTED_SCORE",
    "SAVE",
    "SCORE",
    "Candidate",
    "CodecSet",
    "Decision",
    "FactoredGradient",
    "Facts",
    "Plan",
    "Policy",
    "Predicted",
    "Role",
    "SavedTensor",
    "Storage",
    "TensorRequest",
    "choose",
    "choose_decoded",
    "choose_storage",
    "noise",
    "rank_sites",
    "register_policy",
]

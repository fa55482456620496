"""Policies, one a file: in which form each tensor that crosses is stored."""

from actpass.plan.policies import auto, exact, uniform
from actpass.plan.policies.choose import choose_storage, wanted_again
from actpass.plan.policies.policy import POLICIES, Facts, Policy, register_policy

_REGISTERED = (auto, exact, uniform)
"""By being imported."""

__all__ = ["POLICIES", "Facts", "Policy", "choose_storage", "register_policy", "wanted_again"]

"""actpass: train a transformer in the memory you have, through the compiler, without touching the model.

``torch.compile(model, backend="actcomp", options={...})`` decides in which form every tensor that the forward saves for the
backward is stored. See `actpass.backend.backend.actcomp` for the options.
"""

from actpass import distributed
from actpass.api import (
    audit,
    calibrate,
    explain,
    explore,
    load_state_dict,
    memory_budget,
    plan_deep_model,
    register_with_accelerate,
    report,
    set_memory_budget,
    set_optimizer,
    state_dict,
    step,
)
from actpass.diagnostics.audit import Audit
from actpass.errors import (
    ActpassError,
    ActpassWarning,
    BudgetError,
    DeferredError,
    InternalError,
    OptionError,
    PictureError,
    PlanError,
    ReportError,
    StateError,
)
from actpass.extrapolation.deep_model import Training
from actpass.extrapolation.deep_plan import DeepPlan
from actpass.low_rank_gradient import LowRankGradient
from actpass.plan.sensitivity import Sensitivities
from actpass.plan_file import ModelPlan
from actpass.reporting import Report
from actpass.runtime.deferred_logits import DeferredLogits
from actpass.runtime.progress import show_progress

__version__ = "0.1.0"

__all__ = [
    "ActpassError",
    "ActpassWarning",
    "Audit",
    "BudgetError",
    "DeepPlan",
    "DeferredError",
    "DeferredLogits",
    "InternalError",
    "LowRankGradient",
    "ModelPlan",
    "OptionError",
    "PictureError",
    "PlanError",
    "Report",
    "ReportError",
    "Sensitivities",
    "StateError",
    "Training",
    "__version__",
    "audit",
    "calibrate",
    "distributed",
    "explain",
    "explore",
    "load_state_dict",
    "memory_budget",
    "plan_deep_model",
    "register_with_accelerate",
    "report",
    "set_memory_budget",
    "set_optimizer",
    "show_progress",
    "state_dict",
    "step",
]

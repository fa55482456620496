"""A model's plan as a value and as a file that may be edited by hand."""

from actpass.plan_file.model_plan import ModelPlan

__all__ = ["ModelPlan"]

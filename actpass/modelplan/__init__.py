"""A model's plan as a value and as a file that may be edited by hand."""

from actpass.modelplan.model import ModelPlan

__all__ = ["ModelPlan"]

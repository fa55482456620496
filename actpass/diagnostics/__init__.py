"""What is asked of a model without training it: explain, audit, calibrate."""

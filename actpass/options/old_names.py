"""Options by the names that they had before 0.1, for the error that tells the new one."""

OLD_NAMES = {
    "method": "policy, codec or projection",
    "nonlinear_rank": "activation_rank",
    "scale": "projection_scaling",
    "quantize": "codec",
    "group": "group_size",
    "rotate": "hadamard_rotation",
    "smallest": "min_tensor_bytes",
    "chunk_loss": "chunked_loss",
    "complement": "resample",
    "gradients": "weight_gradient_format",
    "profitable_only": "skip_unprofitable",
    "overrides": "module_overrides",
    "inductor": "inductor_options",
    "calibration": "sensitivities",
}
OLD_VALUES = {"keep": "save", "fp8": "float8_e4m3", "fp8_e5m2": "float8_e5m2"}
"""Of ``codec`` and of overrides."""

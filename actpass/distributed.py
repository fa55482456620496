"""Low-rank gradients over several ranks."""

from actpass.runtime.data_parallel import reduce_low_rank

__all__ = ["reduce_low_rank"]

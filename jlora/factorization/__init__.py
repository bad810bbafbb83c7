"""Matrix → SVD: compiled kernels, and estimates of their error."""

from jlora.factorization.adaptive import AdaptiveSVD, adaptive_svd
from jlora.factorization.error import estimate_error, estimate_sketch_error
from jlora.factorization.gradient import low_rank_approximation
from jlora.factorization.svd import randomized_svd, truncated_svd

__all__ = [
    "AdaptiveSVD",
    "adaptive_svd",
    "estimate_error",
    "estimate_sketch_error",
    "low_rank_approximation",
    "randomized_svd",
    "truncated_svd",
]

"""Decompositions of matrices: compiled kernels, and estimates of their error.

Public, and re-exported here:

    svd.py          randomized_svd, truncated_svd: the SVD of a given rank
    adaptive.py     adaptive_svd: the SVD of the rank that a tolerance needs
    gradient.py     low_rank_approximation: u diag(s) vt as a differentiable function
    error.py        estimate_error, estimate_sketch_error

Kernels, roughly in the order in which `randomized_svd` uses them:

    passes.py       default number of passes and block size
    full.py         the full SVD, if a randomised one would not be cheaper
    operators.py    products of the matrix with thin panels
    iteration.py    one randomised decomposition, from random block to SVD
    sketch.py       random and fixed test matrices
    krylov.py       the projection onto block Krylov spaces
    subspace.py     the projection onto the spaces of subspace iteration
    orthonormal.py  orthonormal bases of the rows of a panel
    projection.py   a matrix projected onto two bases, and its SVD
    core.py         the SVD of the small matrix between two bases
"""

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

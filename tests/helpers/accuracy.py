"""Errors of a decomposition, computed in float64."""

import numpy as np


def optimal_error(a, rank):
    """Return ‖a − a_rank‖_F in float64, the least that rank can reach."""
    s = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    return np.sqrt(np.sum(s[rank:] ** 2))


def residual(a, svd):
    u, s, vt = (np.asarray(part, np.float64) for part in svd)
    return np.linalg.norm(np.asarray(a, np.float64) - (u * s) @ vt)


def orthonormality(u):
    """Return max |uᵀu − I|."""
    u = np.asarray(u, np.float64)
    return np.abs(u.mT @ u - np.eye(u.shape[-1])).max()

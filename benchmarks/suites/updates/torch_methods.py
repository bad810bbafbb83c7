"""The ways in which torch truncates the SVD of a product of factors."""

import functools

from benchmarks.peers.svd import truncate_svd
from benchmarks.run.contenders import Contender
from benchmarks.run.preparation import prepare_torch


def list_torch_methods(rank, join):
    """Return torch's contenders for the truncated SVD of (u, v) = join(*inputs)."""

    def run_dense(*inputs):
        import torch

        u, v = join(*inputs)
        return truncate_svd(rank, *torch.linalg.svd(u @ v, full_matrices=False))

    def run_lowrank(num_iterations, *inputs):
        import torch

        u, v = join(*inputs)
        left, s, right = torch.svd_lowrank(u @ v, q=rank, niter=num_iterations)
        return left, s, right.mT

    def run_thin(*inputs):
        return truncate_svd(rank, *decompose_product(*join(*inputs)))

    return [
        _make_contender(
            "torch dense road",
            run_dense,
            "the product formed, its thin SVD, cut",
            most_runs=2,
        ),
        *(
            _make_contender(
                f"torch.svd_lowrank niter {count}",
                functools.partial(run_lowrank, count),
                f"of the product, formed, q = rank, niter = {count}",
            )
            for count in (4, 16)
        ),
        _make_contender(
            "torch QR of both sides", run_thin, "QR of both, SVD of the core, cut"
        ),
    ]


def _make_contender(name, run, setting, most_runs=None):
    return Contender(
        name,
        functools.partial(prepare_torch, run),
        setting=setting,
        requires=("torch",),
        most_runs=most_runs,
    )


def decompose_product(u, v):
    """Return the SVD (u, s, vt) of u @ v by torch: QR of both, SVD of the core."""
    import torch

    q_u, r_u = torch.linalg.qr(u)
    q_v, r_v = torch.linalg.qr(v.mT)
    left, s, right = torch.linalg.svd(r_u @ r_v.mT)
    return q_u @ left, s, right @ q_v.mT

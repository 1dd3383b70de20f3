"""Matrices of known singular values, and what a decomposition of them must be."""

import torch


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_spectrum(S, m, n, seed=0):
    """``left [m, k]`` and ``right [k, n]`` whose product has the singular values ``S``."""
    S = torch.as_tensor(S, dtype=torch.float64)
    left, _ = torch.linalg.qr(gaussian(m, len(S), seed=seed))
    right, _ = torch.linalg.qr(gaussian(n, len(S), seed=seed + 1))
    return left * S, right.T


def excess(result, M, rank):
    """``|M - M~|`` beyond ``|M - M_r|``, as a share of ``|M|``: what rounding may explain."""
    best = torch.linalg.svdvals(M)[rank:].norm()
    svd = result.svd
    missed = (M - (svd.U.double() * svd.S.double()) @ svd.Vh.double()).norm()
    return float((missed - best) / M.norm())


def check_form(svd, shape, dtype, atol):
    assert svd.shape == shape
    for tensor in (svd.U, svd.S, svd.Vh):
        assert tensor.dtype == dtype and tensor.is_contiguous()
    assert torch.all(svd.S[:-1] >= svd.S[1:]) and torch.all(svd.S > 0)
    eye = torch.eye(svd.rank, dtype=torch.float64)
    for columns in (svd.U.double(), svd.Vh.double().T):
        torch.testing.assert_close(columns.T @ columns, eye, rtol=0, atol=atol)
    if svd.rank:
        largest = svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True))
        assert torch.all(largest > 0), "signs are not fixed"

"""Singular value decompositions of task matrices, by way of the smaller Gram matrix.

The eigenvectors of ``A A^T`` are the singular vectors of A, and finding them takes a fraction of
the time of a singular value decomposition. Squares lose half of the digits, so they are formed in
double precision: what is left is as precise as a decomposition in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # entries that are there in double precision

_DEPENDENT = 1e-5
"""A singular value below this ratio to the largest is taken for 0: its square is lost."""


def singular_vectors(matrix: Tensor, n_most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors of a matrix, and all singular values.

    Args:
        matrix: ``(m, n)`` float32, finite.
        n_most: How many are returned at most; those of singular value 0 are left out.

    Returns:
        Left ones, ``(m, k)``; all ``min(m, n)`` values, the largest first; right ones, ``(n, k)``;
        float32.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.T
    squares, vectors = _eigenvectors(short)
    values = squares.clamp_min(0.0).sqrt()
    least = float(values[0]) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    near = vectors[:, : min(n_most, int((values > least).sum()))]
    far = _others(short, near)
    left, right = (near, far) if is_wide else (far, near)
    return left.float(), values.float(), right.float()


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix whose columns, or else rows, are orthonormal.

    Where they depend on one another there are many; returned is what all of them share, in which
    what columns have in common is divided among them.

    Args:
        matrix: ``(m, n)`` float32, finite.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.T
    squares, vectors = _eigenvectors(short)
    independent = vectors[:, squares > squares.amax() * _DEPENDENT**2]
    nearest = (independent @ _others(short, independent).T).float()
    return nearest if is_wide else nearest.T


def _eigenvectors(short: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of ``short short^T``, the largest first, and its eigenvectors."""
    n_rows = len(short)
    gram = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=short.device)
    for part in _parts(short):
        gram.addmm_(part, part.T)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0), vectors.flip(1)


def _others(short: Tensor, vectors: Tensor) -> Tensor:
    """Return the singular vectors on the other side, ``(n, k)`` float64."""
    others = torch.cat([part.T @ vectors for part in _parts(short)])
    return others.div_(others.norm(dim=0))


def _parts(short: Tensor) -> Iterator[Tensor]:
    """Yield a matrix by its columns, in double precision."""
    for part in torch.split(short, max(1, _AT_ONCE // len(short)), 1):
        yield part.double()

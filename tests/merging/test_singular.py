"""Singular vectors by Gram matrices, beside numpy's decomposition in double precision."""

import numpy as np
import pytest
import torch

from searchmerge.merging.singular import nearest_orthogonal, singular_vectors

SHAPES = [(40, 40), (40, 90), (90, 40), (1, 7), (7, 1)]


def drawn(shape, *, decades=0.0, seed=0):
    """Return a matrix whose singular values span some powers of ten."""
    draw = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(draw.standard_normal(shape), full_matrices=False)
    values = 10.0 ** -np.linspace(0, decades, min(shape))
    return (left * values) @ right, values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [0.5, 3.0])
def test_leading_singular_vectors_give_the_nearest_matrix_of_their_rank(shape, decades):
    matrix, values = drawn(shape, decades=decades)
    n_most = max(1, min(shape) // 4)
    left, sizes, right = singular_vectors(torch.from_numpy(matrix).float(), n_most)
    assert left.dtype == sizes.dtype == right.dtype == torch.float32
    np.testing.assert_allclose(sizes.numpy(), values, rtol=1e-4)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    expected = (u[:, :n_most] * s[:n_most]) @ v[:n_most]
    found = (left * sizes[:n_most]) @ right.T
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-6)
    for vectors in (left, right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(n_most), atol=1e-5)


def test_directions_of_singular_value_0_are_left_out():
    matrix = drawn((30, 5))[0] @ drawn((5, 60), seed=1)[0]
    left, sizes, right = singular_vectors(torch.from_numpy(matrix).float(), 30)
    assert left.shape == (30, 5)
    assert right.shape == (60, 5)
    assert sizes.shape == (30,)
    assert float(sizes[5:].max()) < 1e-6


def test_nothing_is_left_of_a_matrix_of_zeros():
    left, sizes, right = singular_vectors(torch.zeros(4, 6), 2)
    assert left.shape == (4, 0)
    assert right.shape == (6, 0)
    assert not sizes.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [0.0, 3.0])
def test_the_nearest_orthogonal_matrix_is_that_of_the_decomposition(shape, decades):
    matrix = drawn(shape, decades=decades)[0]
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    found = nearest_orthogonal(torch.from_numpy(matrix).float()).numpy()
    np.testing.assert_allclose(found, u @ v, atol=3e-4 if decades else 1e-5)


def test_what_dependent_columns_have_in_common_is_divided_among_them():
    columns = np.linalg.qr(drawn((50, 6))[0])[0]
    found = nearest_orthogonal(torch.from_numpy(np.hstack([columns, columns[:, :2]])).float())
    half = columns[:, :2] / np.sqrt(2)
    np.testing.assert_allclose(found, np.hstack([half, columns[:, 2:], half]), atol=1e-5)


def test_a_matrix_longer_than_what_is_taken_at_once_is_decomposed_in_parts(monkeypatch):
    matrix = torch.from_numpy(drawn((20, 333))[0]).float()
    whole = singular_vectors(matrix, 5)
    monkeypatch.setattr("searchmerge.merging.singular._AT_ONCE", 20 * 50)
    parts = singular_vectors(matrix, 5)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.abs(), other.abs(), atol=1e-5, rtol=1e-5)

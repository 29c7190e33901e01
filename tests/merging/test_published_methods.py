"""Every further method against its paper's equations in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors
from tests.merging import oracles
from tests.merging.test_ties_and_pcb import SHAPES, WHOLE_NUMBERS, drawn, merging

matrices = st.tuples(st.integers(2, 4), st.integers(2, 9), st.integers(2, 9), st.integers(0, 999))


def one_tensor(deltas):
    """Return task vectors of one parameter ``w`` with exactly these entries, any shape."""
    deltas = torch.as_tensor(np.asarray(deltas), dtype=torch.float32)
    experts = {f"e{i}": {"w": own} for i, own in enumerate(deltas)}
    return TaskVectors.from_weights({"w": torch.zeros(deltas.shape[1:])}, experts)


def of_tensor(deltas, method, memory=None, **numbers):
    vectors = one_tensor(deltas)
    merger = Merger(vectors, engine="eager", memory=memory)
    return dict(merger.merged(default_plan(method, vectors.experts, **numbers)))["w"].numpy()


def normal(n, *shape):
    """Return ``n`` task vectors that have no equal entries or singular values."""
    return np.random.default_rng(n).standard_normal((n, *shape)).astype(np.float32).astype(float)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_magmax_is_the_papers(deltas, data):
    numbers = drawn(data, len(deltas), -2, 2)
    found = merging(deltas)("magmax", coefficient=numbers)
    np.testing.assert_allclose(found, oracles.magmax(deltas, numbers), rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_consensus_is_the_papers(deltas, data):
    n = len(deltas)
    thresholds = data.draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=n, max_size=n)
    )
    numbers = {"coefficient": drawn(data, n, -2, 2), "threshold": thresholds}
    agreement = data.draw(st.integers(0, 6))
    found = merging(deltas)("consensus", **numbers, agreement=agreement)
    expected = oracles.consensus(deltas, *numbers.values(), agreement)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_breadcrumbs_is_the_papers(deltas, data):
    n = len(deltas)
    numbers = {
        "coefficient": drawn(data, n, -2, 2),
        "density": drawn(data, n, 0, 1),
        "outliers": [x / 10 for x in drawn(data, n, 0, 1)],
    }
    found = of_tensor(deltas, "breadcrumbs", **numbers)
    expected = oracles.breadcrumbs(deltas, *numbers.values())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_breadcrumbs_leaves_out_the_large_and_the_small():
    deltas = np.arange(1.0, 101.0)[None] * np.where(np.arange(100) % 2, 1, -1)
    found = of_tensor(deltas, "breadcrumbs", coefficient=1.0, density=0.2, outliers=0.05)
    assert sorted(abs(found[found != 0])) == list(range(76, 96))


@settings(max_examples=40, deadline=None)
@given(matrices, st.data())
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_della_is_the_papers(keep_bytes, sizes, data):
    n, rows, columns, seed = sizes
    deltas = np.random.default_rng(seed).integers(-5, 6, (n, rows, columns)).astype(float)
    numbers = {
        "coefficient": drawn(data, n, -2, 2),
        "density": drawn(data, n, 0, 1),
        "window": drawn(data, n, 0, 1),
    }
    kept = [oracles.draws(seed, f"e{i}", "w", rows * columns) for i in range(n)]
    for election in ("none", "ties"):
        if election == "ties":  # divided by a chance, what cancels may not in both precisions
            deltas = deltas + normal(n, rows, columns) / 8
        found = of_tensor(
            deltas, "della", Memory(keep_bytes=keep_bytes), **numbers, election=election, seed=seed
        )
        expected = oracles.della(deltas, *numbers.values(), kept, election=election)
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-4)


def test_della_keeps_the_large_more_often_and_the_mean_as_it_is():
    deltas = np.tile(np.arange(1.0, 1001.0), (1, 200, 1))
    found = of_tensor(deltas, "della", coefficient=1.0, density=0.4, window=0.4, election="none")
    shares = (found != 0).mean(0).reshape(10, 100).mean(1)
    np.testing.assert_allclose(shares, 0.4 + (np.arange(10) - 4.5) * 0.04, atol=0.02)
    np.testing.assert_allclose(found.mean(), deltas.mean(), rtol=0.02)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_sce_is_the_papers(deltas, data):
    density = data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]))
    numbers = drawn(data, len(deltas), -2, 2)
    found = of_tensor(deltas, "sce", coefficient=numbers, density=density)
    expected = oracles.sce(deltas, numbers, density)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_model_stock_is_the_papers(deltas, data):
    numbers = drawn(data, len(deltas), -2, 2)
    found = of_tensor(deltas, "model_stock", coefficient=numbers)
    expected = oracles.model_stock(deltas, numbers)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(0, 999), st.floats(0, 1))
def test_karcher_of_two_is_spherical_interpolation(d, seed, weight):
    deltas = np.random.default_rng(seed).standard_normal((2, d))
    numbers = [3 * (1 - weight), 3 * weight]
    found = of_tensor(deltas, "karcher", coefficient=numbers)
    expected = oracles.slerp(*deltas.astype(np.float32).astype(float), weight)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_karcher_of_many_is_where_squared_angles_are_least():
    deltas, weights = normal(4, 30), np.array([0.1, 0.4, 0.2, 0.3])
    directions = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    deltas = directions  # of length 1, so that the merge is the mean direction
    found = of_tensor(deltas, "karcher", coefficient=list(weights)).astype(float)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)

    def cost(point):
        return weights @ np.arccos(directions @ (point / np.linalg.norm(point))) ** 2

    nudges = np.random.default_rng(0).standard_normal((500, 30)) * 0.01
    assert all(cost(found) < cost(found + nudge) for nudge in nudges)


def test_karcher_of_odd_directions_is_defined():
    one = normal(1, 30)[0]
    opposite = of_tensor([one, -one], "karcher", coefficient=[1.0, 1.0])
    np.testing.assert_allclose(opposite, 0, atol=1e-6)
    alike = of_tensor([one, one, one], "karcher", coefficient=[1.0, 2.0, 3.0])
    np.testing.assert_allclose(alike, one, rtol=1e-5)
    absent = of_tensor([one, 0 * one], "karcher", coefficient=[1.0, 5.0])
    np.testing.assert_allclose(absent, one, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(matrices, st.data())
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_tsv_is_the_papers(keep_bytes, sizes, data):
    n, rows, columns, seed = sizes
    deltas = np.random.default_rng(seed).standard_normal((n, rows, columns))
    numbers = drawn(data, n, -2, 2)
    found = of_tensor(deltas, "tsv", Memory(keep_bytes=keep_bytes), coefficient=numbers)
    if n > min(rows, columns):  # more directions than dimensions: not unique, but finite
        assert np.isfinite(found).all()
        return
    np.testing.assert_allclose(found, oracles.tsv(deltas, numbers), rtol=5e-3, atol=5e-3)


def test_tsv_of_orthogonal_matrices_of_low_rank_is_their_sum():
    frame = np.linalg.qr(normal(1, 12, 12)[0])[0]
    deltas = [
        frame[:, 4 * i : 4 * i + 4] @ np.diag([4.0, 3, 2, 1]) @ frame[:, 4 * i : 4 * i + 4].T
        for i in range(3)
    ]
    found = of_tensor(deltas, "tsv", coefficient=[1.0, 0.5, 2.0])
    expected = deltas[0] + 0.5 * deltas[1] + 2 * deltas[2]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tsv_of_equal_experts_is_their_mean():
    """Of two experts half of the directions stay, the same ones."""
    delta = normal(1, 12, 9)[0]
    found = of_tensor([delta, delta], "tsv", coefficient=[1.0, 0.5])
    left, sizes, right = np.linalg.svd(delta)
    expected = 0.75 * (left[:, :4] * sizes[:4]) @ right[:4]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(matrices, st.data())
def test_iso_c_is_the_papers(sizes, data):
    n, rows, columns, seed = sizes
    deltas = np.random.default_rng(seed).standard_normal((n, rows, columns))
    vectors = one_tensor(deltas)
    merger = Merger(vectors, engine="eager")
    numbers = [(-1) ** i * (0.1 + x) for i, x in enumerate(drawn(data, n, 0, 2))]
    for scale in (1.0, -0.5, 2.0):
        scaled = [scale * x for x in numbers]
        plan = default_plan("iso_c", vectors.experts, coefficient=scaled)
        found = dict(merger.merged(plan))["w"].numpy()
        expected = oracles.iso_c(deltas, scaled)
        sizes = np.linalg.svd(np.tensordot(scaled, deltas, 1), compute_uv=False)
        error = 1e-4 * sizes[0] / sizes[-1]
        np.testing.assert_allclose(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_what_is_no_matrix_is_averaged(method):
    for shape in ((7,), (), (3, 2, 2)):
        deltas = normal(3, *shape)
        found = of_tensor(deltas, method, coefficient=[1.0, 2.0, 3.0])
        expected = np.tensordot([1.0, 2.0, 3.0], deltas, 1) / 3
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "karcher", "model_stock", "sce", "della"])
def test_an_expert_equal_to_the_base_gives_nothing_and_breaks_nothing(method):
    deltas = normal(2, 9, 9)
    alone = of_tensor(np.stack([deltas[0], 0 * deltas[0]]), method, coefficient=1.0)
    assert np.isfinite(alone).all()
    assert alone.any()


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_matrices_are_decomposed_once(method):
    """A changed scale alone reads what was kept, and no expert."""
    vectors = one_tensor(normal(3, 9, 8))
    measured = METHODS[method](Measure(vectors, Engine("eager"), MemoryBudget(2**30)))
    plans = [default_plan(method, vectors.experts, coefficient=c) for c in (0.3, 0.7)]
    first, second = map(measured.bind, plans)
    assert first.kept is second.kept
    assert first.experts == ()

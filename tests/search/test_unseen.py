"""What is not seen is predicted as a normal distribution says, whatever way it is computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.search.unseen import Part, Prior, predict_rest

SIZES = {"a": 7, "b": 5}


def test_the_squares_expected_are_means_with_half_the_largest_added():
    prior = Prior.of({"a": np.array([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]])})
    assert prior.squares["a"] == pytest.approx([(2 + 2) / 3, 2 / 3, (4 + 2) / 3])
    assert Prior.of({"a": np.zeros((0, 2))}).squares["a"] == pytest.approx([0.5, 0.5])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n_plans=st.integers(1, 6))
def test_the_rest_is_the_conditional_distribution_of_the_covariance_that_is_documented(
    seed, n_plans
):
    rng = np.random.default_rng(seed)
    others = {task: rng.normal(size=(n_plans, n)) for task, n in SIZES.items()}
    prior = Prior.of(others)
    seen = {task: np.arange(n) < rng.integers(1, n + 1) for task, n in SIZES.items()}
    parts = {task: Part(mask, rng.normal(size=mask.sum())) for task, mask in seen.items()}
    rest = predict_rest(prior, parts)

    joint, mask = np.concatenate(list(others.values()), axis=1), np.concatenate([*seen.values()])
    expected = np.concatenate(list(prior.squares.values()))
    owner = np.repeat(np.arange(2), list(SIZES.values()))
    covariance = 0.5 / n_plans * joint.T @ joint + np.diag(0.5 * expected)
    for i in range(2):
        throughout = np.where(owner == i, expected, 0.0)
        covariance += np.outer(throughout, throughout) / throughout.sum()
    weights = covariance[~mask][:, mask] @ np.linalg.inv(covariance[mask][:, mask])
    of_task = (owner[~mask] == np.arange(2)[:, None]).astype(float)
    differences = np.concatenate([part.differences for part in parts.values()])
    assert rest.weights == pytest.approx(of_task @ weights, abs=1e-9)
    assert rest.sums == pytest.approx(of_task @ weights @ differences, abs=1e-9)
    left = covariance[~mask][:, ~mask] - weights @ covariance[mask][:, ~mask]
    units = []
    for task, part in parts.items():
        usual = prior.squares[task][part.seen].sum()
        units.append(np.sqrt(((part.differences**2).sum() + usual) / (2 * usual)))
    by_task = of_task @ left @ of_task.T * np.outer(units, units)
    assert rest.covariance == pytest.approx(by_task, abs=1e-9)

"""What is not seen is predicted as a normal distribution says, whatever way it is computed."""

from dataclasses import replace

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


UNITS = {"a": 1.0, "b": 0.5}


def test_the_spread_is_the_mean_square_of_errors_in_standard_errors_with_one_plan_more_of_1():
    rng = np.random.default_rng(3)
    others = {task: rng.normal(size=(5, n)) for task, n in SIZES.items()}
    squares = []
    for i in range(5):
        own = {task: rows[i] for task, rows in others.items()}
        prior = Prior.of({task: np.delete(rows, i, 0) for task, rows in others.items()})
        for part in (6, 3, 2):
            seen = {task: np.arange(n) < max(1, n // part) for task, n in SIZES.items()}
            rest = predict_rest(prior, {t: Part(mask, own[t][mask]) for t, mask in seen.items()})
            unseen = np.array([own[task][~mask].sum() for task, mask in seen.items()])
            units = np.array([*UNITS.values()])
            error = units @ (unseen - rest.sums)
            squares.append(min(4.0, error**2 / (units @ rest.covariance @ units)))
    assert Prior.of(others).found_spread(UNITS) == pytest.approx((1 + sum(squares) / 3) / 6)


def test_the_spread_is_small_where_plans_hang_together_and_large_where_each_stands_out():
    rng = np.random.default_rng(4)
    together = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 80))
    apart = rng.normal(size=(20, 80))
    for i in range(20):  # of which its first half says nothing
        apart[i, 40 + 2 * i : 42 + 2 * i] += 20.0
    spreads = [Prior.of({"a": its[:, :40], "b": its[:, 40:]}) for its in (together, apart)]
    assert spreads[0].found_spread(UNITS) < 0.5 < 1.0 < spreads[1].found_spread(UNITS)


def test_a_plan_that_collapsed_does_not_make_all_others_uncertain():
    rng = np.random.default_rng(7)
    plans = (rng.random((20, 120)) < 0.1).astype(float)
    collapsed = np.concatenate([plans, np.full((1, 120), -1.0)])
    alone, beside = (Prior.of({"a": its}).found_spread({"a": 1.0}) for its in (plans, collapsed))
    assert beside < alone + 0.3


def test_copies_of_plans_do_not_make_predictions_surer():
    """As a search that converges proposes them: what is new differs from all of them."""
    rng = np.random.default_rng(6)
    families = (rng.random((8, 120)) < 0.3) - (rng.random((8, 120)) < 0.3) * 1.0
    copies = np.repeat(families, 6, axis=0)
    changed = rng.random(copies.shape) < 0.01
    copies[changed] = rng.choice([-1.0, 0.0, 1.0], changed.sum())
    alone, beside = (Prior.of({"a": its}).found_spread({"a": 1.0}) for its in (families, copies))
    assert beside > 0.6 * alone
    assert alone > 0.5


@pytest.mark.parametrize("n_plans", [0, 1])
def test_where_there_is_nothing_to_try_a_prior_on_its_spread_is_what_is_expected(n_plans):
    assert Prior.of({"a": np.zeros((n_plans, 6))}).found_spread({"a": 1.0}) == 1.0


def test_the_covariance_is_multiplied_by_the_spread_and_nothing_else_is():
    rng = np.random.default_rng(5)
    prior = Prior.of({task: rng.normal(size=(4, n)) for task, n in SIZES.items()})
    parts = {t: Part(np.arange(n) < 3, rng.normal(size=3)) for t, n in SIZES.items()}
    once, twice = (predict_rest(replace(prior, spread=s), parts) for s in (1.0, 2.0))
    assert twice.covariance == pytest.approx(2 * once.covariance)
    assert twice.sums == pytest.approx(once.sums)
    assert twice.weights == pytest.approx(once.weights)

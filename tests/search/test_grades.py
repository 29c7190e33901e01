"""Grades: what they say beside the metric, as far as plans show that they mean the same."""

import numpy as np
import pytest
from scipy.stats import norm

from searchmerge.search.grades import METRIC, Grader, Reading, Step, Table, learn, soft


def plans(rng, n_plans=24, n_examples=60):
    """Return plans whose grades tell how good they are, and how good they are."""
    quality = rng.normal(0.6, 0.25, n_plans)
    hidden = quality[:, None] + rng.normal(0.0, 1.0, (n_plans, n_examples))
    return Table((hidden > 0).astype(float), hidden), quality


def read(table, seed=0):
    return learn({"a": table}, seed).reading("a")


def test_a_soft_step_is_taken_in_units_of_the_plans_own_grades():
    grades = np.array([[-2.0, 1.0, 3.0], [-4.0, 2.0, 6.0]])
    assert soft(grades, 2.0)[0] == pytest.approx(norm.cdf(grades[0] / (2 * 2.0)))
    assert soft(grades, 2.0)[1] == pytest.approx(soft(grades, 2.0)[0])


def test_a_reading_is_the_sum_of_its_parts():
    values, grades = np.array([1.0, 0.0, 1.0]), np.array([-2.0, 1.0, 3.0])
    reading = Reading((Step(0.25, 1.0, 0.1), Step(0.5, 2.0, -0.2)), 0.5)
    expected = 0.25 * values
    expected += 0.25 * (norm.cdf(grades / 2.0) + 0.1) + 0.5 * (norm.cdf(grades / 4.0) - 0.2)
    assert reading(values, grades) == pytest.approx(expected)
    assert reading.weight == pytest.approx(0.75)


def test_grades_that_mean_the_metric_are_read_and_tell_the_better_plans_apart():
    gains, weights = [], []
    for seed in range(12):
        table, quality = plans(np.random.default_rng(seed))
        reading = read(table)
        told = reading(table.values, table.grades).mean(1)
        by_metric = np.corrcoef(table.values.mean(1), quality)[0, 1]
        gains.append(np.corrcoef(told, quality)[0, 1] - by_metric)
        weights.append(reading.weight)
    assert np.mean(weights) > 0.25
    assert np.mean(gains) > 0.015


def test_grades_that_mean_something_else_are_not_read():
    rng = np.random.default_rng(1)
    table, quality = plans(rng, n_plans=60, n_examples=200)
    confident = -2 * quality[:, None] + rng.normal(0.0, 1.0, table.values.shape)
    reading = read(Table(table.values, confident))
    assert reading.weight == 0
    assert reading.agreement < -0.5


def test_a_task_that_tells_little_is_read_as_the_others_are():
    rng = np.random.default_rng(2)
    telling, _ = plans(rng, n_plans=40, n_examples=120)
    alike = Table(*(part[:, :16] for part in plans(rng, n_plans=40)[0]))
    alone = learn({"b": alike}, 0).reading("b").weight
    beside = learn({"a": telling, "b": alike}, 0).reading("b").weight
    assert beside > alone


def test_grades_that_contradict_the_metric_are_not_read_because_others_do_well():
    rng = np.random.default_rng(5)
    telling, _ = plans(rng, n_plans=40, n_examples=120)
    table, quality = plans(rng, n_plans=40)
    little = table.values[:, :16]
    confident = -3 * quality[:, None] + rng.normal(0.0, 0.5, little.shape)
    reading = learn({"a": telling, "b": Table(little, confident)}, 0).reading("b")
    assert reading.contradicts
    assert reading.weight == 0


@pytest.mark.parametrize(
    "table",
    [
        plans(np.random.default_rng(3), n_plans=4)[0],
        Table(np.ones((9, 20)), np.random.default_rng(3).normal(size=(9, 20))),
    ],
    ids=["few plans", "plans that all score the same"],
)
def test_where_there_is_nothing_to_learn_from_the_metric_is_read(table):
    assert read(table) == METRIC


def test_reading_keeps_the_mean_over_the_plans():
    table, _ = plans(np.random.default_rng(4), n_plans=60)
    reading = read(table)
    assert reading.weight > 0
    assert reading(table.values, table.grades).mean() == pytest.approx(table.values.mean())


def test_what_is_learnt_depends_on_nothing_but_the_tables_and_the_seed():
    table, _ = plans(np.random.default_rng(5))
    again = Table(table.values.copy(), table.grades.copy())
    assert read(table, seed=7) == read(again, seed=7)


def test_tasks_without_a_reading_are_read_by_their_metric():
    grader = Grader({"a": Reading((Step(1.0, 2.0, 0.0),), 0.5)})
    assert grader.observations("b", [1.0, 0.0], [5.0, -5.0]).tolist() == [1.0, 0.0]
    assert grader.observations("a", [1.0, 0.0], [5.0, -5.0])[0] == pytest.approx(norm.cdf(0.5))
    assert grader.observations("a", [1.0, 0.0], []).tolist() == [1.0, 0.0]


def test_how_clearly_examples_are_answered_is_what_other_plans_say_of_them():
    sizes = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0], [0.0] * 5])
    grader = Grader({}, {"math": sizes})
    assert grader.clarity("math", [0, 1, 2, 3, 4]) == pytest.approx(1.0)
    assert grader.clarity("math", [0, 1]) == pytest.approx(1.5 / 3)
    assert grader.clarity("math", [4]) == pytest.approx(5 / 3)
    assert grader.clarity("law", [4]) == 1.0  # of which nothing is known


def test_some_examples_are_read_as_they_will_be_among_all():
    rng = np.random.default_rng(0)
    profile, signs = rng.gamma(2.0, size=40), rng.choice([-1.0, 1.0], size=40)
    grades = 3 * profile * signs  # as other plans, but three times as sure of everything
    values = (grades > 0).astype(float)
    reading = Reading((Step(0.7, 1.0, 0.1),), 0.9)
    grader = Grader({"math": reading}, {"math": profile * np.array([[1.0], [0.5]])})
    whole = grader.observations("math", values, grades)
    first = np.argsort(profile)[:8]  # the least clear ones
    some = grader.observations("math", values[first], grades[first], first.tolist())
    np.testing.assert_allclose(some, whole[first])
    assert np.abs(grader.observations("math", values[first], grades[first]) - some).max() > 0.1

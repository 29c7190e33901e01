"""Grades: what they say beside the metric, as far as plans show that they mean the same."""

import numpy as np
import pytest
from scipy.stats import norm

from searchmerge.search.grades import METRIC, Grader, Reading, Table, learn, soft


def plans(rng, n_plans=24, n_examples=60, meaning=1.0):
    """Return plans whose grades tell how good they are, or say nothing where meaning is 0."""
    quality = rng.normal(0.6, 0.25, n_plans)[:, None]
    hidden = quality + rng.normal(0.0, 1.0, (n_plans, n_examples))
    values = (hidden > 0).astype(float)
    told = meaning * hidden + (1 - meaning) * rng.normal(0.0, 1.0, hidden.shape)
    return Table(values, told), quality[:, 0]


def test_a_soft_step_is_taken_in_units_of_the_plans_own_grades():
    grades = np.array([[-2.0, 1.0, 3.0], [-4.0, 2.0, 6.0]])
    assert soft(grades, 2.0)[0] == pytest.approx(norm.cdf(grades[0] / (2 * 2.0)))
    assert soft(grades, 2.0)[1] == pytest.approx(soft(grades, 2.0)[0])


def test_grades_that_mean_the_metric_are_read_and_tell_the_better_plans_apart():
    gains, n_read = [], 0
    for seed in range(12):
        table, quality = plans(np.random.default_rng(seed))
        reading = learn(table)
        read = reading(table.values, table.grades).mean(1)
        gains.append(
            np.corrcoef(read, quality)[0, 1] - np.corrcoef(table.values.mean(1), quality)[0, 1]
        )
        n_read += reading.weight > 0
    assert n_read >= 9
    assert np.mean(gains) > 0.03


def test_grades_that_mean_something_else_are_not_read():
    rng = np.random.default_rng(1)
    table, quality = plans(rng, n_plans=60, n_examples=200)
    confident = -2 * quality[:, None] + rng.normal(0.0, 1.0, table.values.shape)
    reading = learn(Table(table.values, confident))
    assert reading.weight == 0
    assert reading.agreement < -0.5


def test_of_a_few_plans_nothing_is_learnt():
    table, _ = plans(np.random.default_rng(2), n_plans=4)
    assert learn(table) == METRIC


def test_reading_keeps_the_mean_over_the_plans():
    table, _ = plans(np.random.default_rng(3))
    reading = learn(table)
    assert reading(table.values, table.grades).mean() == pytest.approx(table.values.mean())


def test_what_is_learnt_depends_on_nothing_but_the_table_and_the_seed():
    table, _ = plans(np.random.default_rng(4))
    assert learn(table, seed=7) == learn(Table(table.values.copy(), table.grades.copy()), seed=7)


def test_tasks_without_a_reading_are_read_by_their_metric():
    grader = Grader({"a": Reading(1.0, 2.0)})
    assert grader.observations("b", [1.0, 0.0], [5.0, -5.0]).tolist() == [1.0, 0.0]
    assert grader.observations("a", [1.0, 0.0], [5.0, -5.0])[0] == pytest.approx(norm.cdf(0.5))
    assert grader.observations("a", [1.0, 0.0], []).tolist() == [1.0, 0.0]

"""Grades: what they say beside the metric, as far as plans show that they mean the same."""

import numpy as np
import pytest
from scipy.stats import norm

from searchmerge.search.grades import (
    METRIC,
    Graded,
    Grader,
    Reading,
    Step,
    Table,
    Unit,
    learn,
    soft,
)


def plans(rng, n_plans=24, n_examples=60):
    """Return plans whose grades tell how good they are, and how good they are."""
    quality = rng.normal(0.6, 0.25, n_plans)
    hidden = quality[:, None] + rng.normal(0.0, 1.0, (n_plans, n_examples))
    return Table((hidden > 0).astype(float), hidden), quality


def read(table, seed=0):
    return learn({"a": table}, seed).reading("a")


def test_a_soft_step_is_taken_in_units_of_the_plans_own_grades():
    grades = np.array([[-2.0, 1.0, 3.0], [-4.0, 2.0, 6.0]])
    unit = np.sqrt([2.0, 1.0, 3.0]).mean() ** 2
    assert soft(grades, 2.0)[0] == pytest.approx(norm.cdf(grades[0] / (2 * unit)))
    assert soft(grades[0], 2.0, 5.0) == pytest.approx(norm.cdf(grades[0] / 10))
    assert soft(grades, 2.0)[1] == pytest.approx(soft(grades, 2.0)[0])


def test_a_reading_is_the_sum_of_its_parts():
    values, grades = np.array([1.0, 0.0, 1.0]), np.array([-2.0, 1.0, 3.0])
    reading = Reading((Step(0.25, 1.0, 0.1), Step(0.5, 2.0, -0.2)), 0.5)
    expected = 0.25 * values
    expected += 0.25 * (norm.cdf(grades / 3.0) + 0.1) + 0.5 * (norm.cdf(grades / 6.0) - 0.2)
    assert reading(values, grades, 3.0) == pytest.approx(expected)
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
    little = table.values[:, :32]
    confident = -3 * quality[:, None] + rng.normal(0.0, 0.5, little.shape)
    reading = learn({"a": telling, "b": Table(little, confident)}, 0).reading("b")
    assert reading.contradicts
    assert reading.weight == 0


def partly(table, n_full, n_seen):
    """Return the table where all plans but the first were scored on the first examples alone."""
    is_seen = (np.arange(table.values.shape[1]) < n_seen) | (
        np.arange(len(table.values)) < n_full
    )[:, None]
    return Table(*(np.where(is_seen, part, np.nan) for part in table))


def test_plans_that_were_stopped_early_tell_how_to_read_the_others():
    """From all plans, seen in part, nearly what all of them tell; from the few in full, less."""
    off = []
    for seed in range(12):
        table, _ = plans(np.random.default_rng(seed), n_plans=48, n_examples=72)
        whole, part = read(table).weight, read(partly(table, 8, 32)).weight
        alone = read(Table(*(its[:8] for its in table))).weight
        off.append((abs(part - whole), abs(alone - whole)))
    by_part, by_few = np.mean(off, axis=0)
    assert by_part < 0.7 * by_few


def test_plans_of_which_hardly_anything_is_seen_tell_nothing():
    table, _ = plans(np.random.default_rng(6), n_plans=60)
    few = Table(*(its[:8] for its in table))
    told, alone = (learn({"a": its}, 0).reading("a") for its in (partly(table, 8, 3), few))
    assert told.agreement == pytest.approx(alone.agreement)
    assert told.weight == pytest.approx(alone.weight)


def test_what_is_seen_of_one_task_in_full_may_be_a_part_of_another():
    """So that the plans that are known in full are not the same of both."""
    rng = np.random.default_rng(8)
    small, _ = plans(rng, n_plans=20, n_examples=16)
    large, _ = plans(rng, n_plans=20, n_examples=96)
    seen = {"small": partly(small, 14, 0), "large": partly(large, 9, 24)}
    grader = learn(seen, 0)
    whole = {"small": small, "large": large}
    graded = {task: Graded(range(8), its.grades[19, :8]) for task, its in whole.items()}
    units = grader.units(graded)
    alone = learn({task: Table(*(i[:9] for i in its)) for task, its in whole.items()}, 0)
    assert units == alone.units(graded)  # by the nine plans that are known in full of both


def test_how_hard_the_first_examples_are_is_no_difference_between_plans():
    """The first half is hard for all, and some plans are seen on that alone."""
    table, _ = plans(np.random.default_rng(7), n_plans=30, n_examples=80)
    hard = np.where(np.arange(80) < 40, -3.0, 0.0)
    harder = Table((table.grades + hard > 0).astype(float), table.grades + hard)
    few, more = (read(Table(*(i[:n] for i in partly(harder, 15, 40)))) for n in (15, 30))
    assert more.agreement == pytest.approx(few.agreement, abs=0.25)


@pytest.mark.parametrize(
    "table",
    [
        plans(np.random.default_rng(3), n_plans=4)[0],
        Table(np.ones((9, 20)), np.random.default_rng(3).normal(size=(9, 20))),
        partly(plans(np.random.default_rng(3), n_plans=20)[0], 4, 30),
    ],
    ids=["few plans", "plans that all score the same", "few plans in full"],
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
    assert grader.read("b", [1.0, 0.0], [5.0, -5.0]).values.tolist() == [1.0, 0.0]
    assert grader.read("a", [1.0, 0.0], [5.0, -5.0]).values[0] == pytest.approx(norm.cdf(0.5))
    assert grader.read("a", [1.0, 0.0], []).values.tolist() == [1.0, 0.0]


def unlike(rng, n_plans, n_examples=64):
    """Return the grades of plans of which each answers the first examples more or less clearly."""
    profile = np.linspace(0.2, 3.0, n_examples)
    turned = rng.normal(0.0, 0.5, (n_plans, 1)) * np.linspace(1.0, -1.0, n_examples)
    sizes = profile * np.exp(turned + rng.normal(0.0, 0.3, (n_plans, n_examples)))
    return sizes * rng.choice([-1.0, 1.0], sizes.shape)


def unit_of(grades):
    return np.sqrt(np.abs(grades)).mean() ** 2


def learnt(grades, beside=None):
    """Return a grader that knows the grades of plans of one task."""
    table = Table((grades > 0).astype(float), grades)
    return learn({"math": table}, 0, {} if beside is None else {"math": beside})


def test_a_plans_unit_is_predicted_from_the_examples_that_are_seen_with_its_error():
    rng = np.random.default_rng(0)
    grader = learnt(unlike(rng, 12))
    for n_seen in (8, 24, 48):
        off, taken_alone = [], []
        for grades in unlike(rng, 200):
            unit = grader.units({"math": Graded(range(n_seen), grades[:n_seen])})["math"]
            off.append((np.log(unit.size / unit_of(grades)), unit.error))
            taken_alone.append(np.log(unit_of(grades[:n_seen]) / unit_of(grades)))
        errors, expected = np.array(off).T
        assert np.sqrt((errors**2).mean()) < 0.4 * np.sqrt(np.mean(np.square(taken_alone)))
        assert 0.4 < np.sqrt(((errors / expected) ** 2).mean()) < 2.2


def test_a_unit_is_what_it_is_once_all_is_seen_and_none_where_nothing_is_known():
    rng = np.random.default_rng(1)
    grader, [grades] = learnt(unlike(rng, 12)), unlike(rng, 1)
    places = rng.permutation(len(grades)).tolist()
    whole = grader.units({"math": Graded(places, grades[places])})["math"]
    assert whole == pytest.approx((unit_of(grades), 0.0))
    assert grader.units({"law": Graded([0], [1.0])}) == {}
    assert Grader({}).units({"math": Graded([0], [1.0])}) == {}


def test_the_base_and_the_experts_tell_how_far_a_unit_may_be_off():
    rng = np.random.default_rng(2)
    alike = unlike(rng, 1) * np.exp(rng.normal(0.0, 0.02, (8, 64)))
    seen = {"math": Graded(range(8), alike[0, :8])}
    alone = learnt(alike).units(seen)["math"]
    beside = learnt(alike, unlike(rng, 4)).units(seen)["math"]
    assert beside.error > 2 * alone.error
    assert beside.size == pytest.approx(alone.size, rel=0.1)


def test_a_unit_that_may_be_off_shifts_what_examples_count_as():
    reading = Reading((Step(0.7, 1.0, 0.1),), 0.9)
    grader = Grader({"math": reading})
    values, grades = np.array([1.0, 0.0, 1.0]), np.array([2.0, -1.0, 0.5])
    read = grader.read("math", values, grades, Unit(1.5, 0.2))
    assert read.values == pytest.approx(reading(values, grades, 1.5))
    less, more = (reading(values, grades, 1.5 * np.exp(by)) for by in (-0.2, 0.2))
    assert read.shifts == pytest.approx((less - more) / 2)
    assert read.shifts[0] > 0 > read.shifts[1]
    assert not grader.read("math", values, grades).shifts.any()

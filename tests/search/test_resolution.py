"""How far apart plans must be to be told apart, and what would tell them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.merging.method import default_plan
from searchmerge.search.auto_space import auto_space
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.resolution import (
    DISAGREE,
    N_ERRORS,
    WANTED,
    examples_wanted,
    expected_error,
    recorded_error,
    trials_wanted,
)
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.trials import TrialRecord

EXPERTS = ("math", "code")
PLAN = default_plan("ties", EXPERTS)


def test_the_expected_error_is_that_of_plans_that_differ_on_as_many_examples():
    objective = Objective("mean", {"math": Goal(2.0), "code": Goal()})
    counts = {"math": 60, "code": 150}
    rng = np.random.default_rng(0)
    halves = [DISAGREE / 2, 1 - DISAGREE, DISAGREE / 2]
    drawn = {
        task: rng.choice([-1, 0, 1], p=halves, size=(20_000, n)).mean(1)
        for task, n in counts.items()
    }
    differences = (2 * drawn["math"] + drawn["code"]) / 3
    assert expected_error(objective, counts) == pytest.approx(differences.std(), rel=0.02)


@pytest.mark.parametrize("kind", ["worst", "tasks"])
def test_of_no_mean_over_tasks_the_task_with_the_fewest_examples_counts(kind):
    objective = Objective(kind, {"math": Goal(), "code": Goal()})
    error = expected_error(objective, {"math": 40, "code": 400})
    assert error == pytest.approx(math.sqrt(DISAGREE / 40))


@given(st.integers(8, 500), st.floats(0.001, 0.1))
def test_as_many_examples_as_are_wanted_tell_apart_what_is_worth_finding(n_examples, error):
    wanted = examples_wanted(error, n_examples, 8)
    reached = N_ERRORS * error * math.sqrt(n_examples / wanted)
    assert reached <= WANTED * (1 + 1e-9)
    assert wanted == n_examples or wanted % 8 == 0
    if wanted - 8 > n_examples:
        assert N_ERRORS * error * math.sqrt(n_examples / (wanted - 8)) > WANTED


def test_the_recorded_error_is_the_usual_one_of_the_best_trials_in_full():
    errors = [0.5, 0.03, 0.01, 0.02]  # the first has the worst value, of eleven in full
    records = [TrialRecord(0, PLAN, value=0.1, values=(0.1,), se=errors[0])]
    for number in range(1, 11):
        plan = default_plan("ties", EXPERTS, coefficient=number / 10)
        records.append(
            TrialRecord(number, plan, value=0.9, values=(0.9,), se=errors[1 + number % 3])
        )
    stopped = default_plan("ties", EXPERTS, coefficient=1.5)
    records.append(TrialRecord(11, stopped, value=1.0, values=(1.0,), se=0.4, stopped_after=6))
    among = sorted(errors[1 + number % 3] for number in range(1, 11))
    assert recorded_error(records) == pytest.approx((among[4] + among[5]) / 2)


def test_a_study_without_errors_tells_nothing():
    first = TrialRecord(0, PLAN, value=0.9, values=(0.9,))
    assert recorded_error([first]) is None
    assert recorded_error([]) is None


def test_more_numbers_are_given_more_trials_within_bounds():
    def space(*rows):
        methods = ["ties", "pcb"][: len(rows)]
        return SearchSpace(
            EXPERTS,
            [
                Alternative(method, method, values={"coefficient": Range(0.0, 2.0, per)})
                for method, per in zip(methods, rows, strict=True)
            ],
        )

    assert trials_wanted(space("all")) == 20
    assert trials_wanted(space("expert", "expert")) == 40
    assert trials_wanted(auto_space(EXPERTS)) == 40
    many = tuple(f"expert {i}" for i in range(30))
    each = Alternative("ties", "ties", values={"coefficient": Range(0.0, 2.0, "expert")})
    assert trials_wanted(SearchSpace(many, [each])) == 200

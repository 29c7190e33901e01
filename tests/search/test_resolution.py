"""How far apart plans must be to be told apart, and what would tell them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Block, BlockScores
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
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace

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


N = 64
GOALS = {"math": Goal(2.0), "code": Goal()}


@pytest.fixture
def board(tmp_path):
    blocks = {
        task: tuple(Block(task, "pilot", i, tuple(range(8 * i, 8 * i + 8))) for i in range(N // 8))
        for task in GOALS
    }
    store = ScoreStore(tmp_path / "scores.db")
    schedule = Schedule.interleaved(
        dict.fromkeys(GOALS, TaskInfo(N)), {"pilot": blocks}, round_blocks=4, seed=0
    )
    yield Scoreboard(schedule, store)
    store.close()


def put(board, scored, right):
    blocks = [b for its in board.schedule.blocks["pilot"].values() for b in its]
    board.store.put(
        scored, [BlockScores(b, tuple(right[b.task][list(b.examples)].tolist())) for b in blocks]
    )


def test_the_recorded_error_is_that_of_the_better_half_paired_by_example(board):
    rng = np.random.default_rng(0)
    plans, right = [], []
    for number, accuracy in enumerate((0.9, 0.85, 0.4, 0.3)):
        plans.append(default_plan("ties", EXPERTS, coefficient=number / 4))
        right.append({task: (rng.random(N) < accuracy).astype(float) for task in GOALS})
        put(board, plans[-1], right[-1])
    unscored = default_plan("ties", EXPERTS, coefficient=1.9)
    difference = {task: right[0][task] - right[1][task] for task in GOALS}
    variance = sum(
        (weight / 3) ** 2 * difference[task].var(ddof=1) / N
        for task, weight in (("math", 2), ("code", 1))
    )
    found = recorded_error(board, [*plans, unscored], Objective("mean", GOALS))
    assert found == pytest.approx(math.sqrt(variance))


def test_nothing_is_known_of_one_plan_or_of_the_worst_task(board):
    right = {task: np.arange(N) % 2 * 1.0 for task in GOALS}
    plans = [PLAN, default_plan("ties", EXPERTS, coefficient=0.3)]
    put(board, plans[0], right)
    assert recorded_error(board, plans, Objective("mean", GOALS)) is None
    put(board, plans[1], {task: 1 - values for task, values in right.items()})
    assert recorded_error(board, plans, Objective("mean", GOALS)) is not None
    assert recorded_error(board, plans, Objective("worst", GOALS)) is None


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

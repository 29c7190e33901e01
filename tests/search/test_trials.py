"""What is kept of a trial, and how trials are ranked: one way, wherever it is asked."""

from dataclasses import replace
from datetime import datetime, timedelta

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.trials import (
    FAILED,
    TrialRecord,
    begin,
    best_of,
    by_completion,
    count_cut_off,
    enqueue,
    front_of,
    front_with,
    left_running,
    ranked,
    standing_of,
)
from tests.toy import EXPERTS

GOALS = {"math": Goal(), "code": Goal()}
OBJECTIVE = Objective("mean", GOALS, constraints=(Constraint("math", "score", 0.5),))
FRONT = Objective("tasks", GOALS, constraints=(Constraint("math", "score", 0.2),))


def plan(number):
    return MergePlan("task_arithmetic", EXPERTS, {"coefficient": ((number, 0.2, 0.1),)})


def record(number, math, code, objective=OBJECTIVE, **fields):
    bare = TrialRecord(number, plan(fields.pop("plan_number", number)), **fields)
    return bare.judged(objective, {"math": math, "code": code})


def study_of(storage=None, n_objectives=1):
    return optuna.create_study(
        storage=storage or InMemoryStorage(), directions=["maximize"] * n_objectives
    )


# --- Writing and reading ------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_after", [None, 7])
def test_a_record_is_read_as_it_was_written(stopped_after):
    study = study_of()
    enqueue(study, "TIES", {"x": 0.25})
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    begin(trial, plan(0.25))
    written = TrialRecord.of(trial, plan(0.25)).judged(OBJECTIVE, {"math": 0.25, "code": 0.75})
    assert written.kind == "TIES"
    written = replace(written, stopped_after=stopped_after, merge_s=0.5, score_s=1.25)
    written.write(trial)
    study.tell(trial, written.values)
    [stored] = study.trials
    read = TrialRecord.read(stored)
    assert read.datetime_complete == stored.datetime_complete
    names = set(TrialRecord.__slots__) - {"datetime_complete"}
    assert {n: getattr(read, n) for n in names} == {n: getattr(written, n) for n in names}
    assert read.violations == stored.constraints == {"math at least 0.5": 0.25}
    assert read.is_full == (stopped_after is None)
    assert read.seconds == 1.75


def test_a_failed_trial_keeps_its_plan_and_its_reason():
    study = study_of()
    trial = study.ask()
    begin(trial, plan(0))
    TrialRecord(trial.number, plan(0), failure="NaN logits").write(trial)
    study.tell(trial, state=TrialState.FAIL)
    read = TrialRecord.read(study.trials[0])
    assert (read.plan, read.failure, read.value) == (plan(0), "NaN logits", None)
    assert not read.is_full
    assert read.standing == FAILED


def test_a_trial_of_an_earlier_version_is_refused():
    study = study_of()
    trial = study.ask()
    begin(trial, plan(0))
    trial.set_user_attr("result", {"scores": {"math": 0.5}, "partial": None})
    study.tell(trial, 0.5)
    with pytest.raises(StudyError, match="trial 0 was scored by an earlier version"):
        TrialRecord.read(study.trials[0])


def test_a_completed_trial_is_full_with_its_new_scores_and_still_counts_as_stopped():
    stopped = record(3, 0.6, 0.8, stopped_after=4)
    assert not stopped.is_full
    kept = stopped.judged(OBJECTIVE, {"math": 0.4, "code": 0.9}).completed_scores()
    completed = stopped.completed(kept)
    assert completed.is_full
    assert completed.stopped_after == 4
    assert completed.value == pytest.approx(0.65)
    assert completed.values == (completed.value,)
    assert not completed.is_feasible


# --- Ranking ------------------------------------------------------------------------------------


def test_plans_that_keep_the_constraints_come_first_whatever_they_score():
    kept, broken, worse = record(0, 0.5, 0.1), record(1, 0.4, 1.0), record(2, 0.3, 1.0)
    assert [r.number for r in ranked([worse, broken, kept])] == [0, 1, 2]
    assert best_of([worse, broken, kept], 3) == [kept]
    assert best_of([worse, broken], 3) == [broken, worse]


def test_each_plan_is_ranked_once_and_references_need_not_count():
    again = record(5, 0.9, 0.9, plan_number=1)
    records = [record(1, 0.9, 0.9), record(2, 0.8, 0.8), record(3, 0.7, 0.7), again]
    assert [r.number for r in best_of(records, 9)] == [1, 2, 3]
    assert best_of([TrialRecord(0, plan(0), failure="NaN")], 3) == []


def test_of_equal_trials_the_first_is_the_best():
    records = [record(4, 0.6, 0.6), record(2, 0.6, 0.6)]
    assert [r.number for r in best_of(records, 2)] == [4, 2]


def test_with_several_objectives_those_on_the_front_come_first():
    """By their mean, the third would be ahead of the second, which nothing dominates."""
    records = [
        record(number, *scores, FRONT)
        for number, scores in enumerate([(0.9, 0.5), (0.3, 0.8), (0.85, 0.45), (0.1, 1.0)])
    ]
    assert [r.number for r in front_of(records)] == [0, 1]
    assert [r.number for r in ranked(records)] == [0, 1, 2, 3]
    assert [r.number for r in best_of(records, 9)] == [0, 1, 2]


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), max_size=12))
def test_the_front_is_what_no_other_feasible_trial_dominates(scores):
    records = [record(i, m / 4, c / 4, FRONT) for i, (m, c) in enumerate(scores)]
    feasible = [r for r in records if r.scores["math"] >= 0.2]
    expected = [
        mine
        for mine in feasible
        if not any(
            other.values != mine.values
            and all(o >= m for o, m in zip(other.values, mine.values, strict=True))
            for other in feasible
        )
    ]
    assert front_of(records) == expected
    grown = []
    for one in records:
        grown = front_with(grown, one)
    assert grown == expected


def test_one_objective_has_no_front():
    assert front_of([record(0, 0.9, 0.9), record(1, 0.5, 0.5)]) == []


def test_a_stored_trial_stands_where_its_record_stands():
    study = study_of()
    for number, scores in enumerate([(0.9, 0.5), (0.4, 0.8), (0.1, 1.0)]):
        trial = study.ask()
        begin(trial, plan(number))
        told = record(number, *scores)
        told.write(trial)
        study.tell(trial, told.values)
        stored = study.trials[number]
        assert standing_of(stored) == told.standing == TrialRecord.read(stored).standing
    study.tell(study.ask(), state=TrialState.FAIL)
    assert standing_of(study.trials[3]) == FAILED < standing_of(study.trials[2])


def test_trials_are_put_in_the_order_in_which_they_finished():
    start = datetime(2024, 1, 1)
    records = [
        TrialRecord(number, plan(number), datetime_complete=start + timedelta(seconds=second))
        for number, second in ((0, 3), (1, 1), (2, 1))
    ]
    assert [r.number for r in by_completion(reversed(records))] == [1, 2, 0]


# --- Trials that run ----------------------------------------------------------------------------


def test_trials_left_running_are_taken_up_with_what_they_had():
    storage = InMemoryStorage()
    study = study_of(storage)
    study.tell(study.ask(), 1.0)
    asked = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    [taken_up] = left_running(study, storage)
    assert (taken_up.number, taken_up.params) == (1, asked.params)
    study.tell(taken_up, 0.5)
    assert left_running(study, storage) == []
    assert study.trials[1].value == 0.5


def test_runs_that_end_over_a_trial_are_counted_until_it_comes_further():
    trial = study_of().ask()
    assert [count_cut_off(trial, n_blocks) for n_blocks in (3, 3, 3)] == [1, 2, 3]
    assert [count_cut_off(trial, n_blocks) for n_blocks in (5, 5)] == [1, 2]

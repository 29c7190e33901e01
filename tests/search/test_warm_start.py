"""A study begins where an earlier one ended."""

import pytest

from searchmerge.errors import SpecError, StudyError
from searchmerge.search.objective import Constraint, Objective
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.warm_start import earlier_plans, warm_start_params
from tests.search.conftest import OPTIMUM
from tests.toy import EXPERTS


def test_a_warm_start_asks_the_earlier_best_plans_first(toy, tmp_path_factory):
    first = toy()
    trials = first.run(12, references={})
    earlier = sorted(trials, key=lambda t: -t.value)[:3]
    narrow = SearchSpace(
        EXPERTS, [Alternative("n", "task_arithmetic", values={"coefficient": Range(0.0, 0.8)})]
    )
    params = warm_start_params([first.directory.run_dir], narrow, 3)
    assert params == [{k: min(0.8, v) for k, v in trial.params.items()} for trial in earlier]
    other = SearchSpace(EXPERTS, [Alternative("n", "ties")])
    with pytest.raises(SpecError, match=r"none of the 3 best plans of .* fits this space"):
        warm_start_params([first.directory.run_dir], other, 3)
    with pytest.raises(StudyError, match="no study here"):
        warm_start_params([tmp_path_factory.mktemp("empty")], narrow, 3)


def test_refined_plans_are_not_begun_with(toy):
    first = toy()
    first.directory.enqueue_refined("trial 5", OPTIMUM, {"key": "a"})
    first.run(8)
    records = first.directory.records()
    assert max(records, key=lambda record: record.value).plan == OPTIMUM
    assert len(records) == 9
    plans = earlier_plans(first.directory.run_dir, 9)
    assert len(plans) == 8
    assert OPTIMUM not in plans


def test_plans_that_break_a_constraint_come_after_all_that_keep_it(toy):
    first = toy()
    first.objective = Objective(
        "mean", first.objective.goals, constraints=(Constraint("math", "score", 0.98),)
    )
    first.run(12, references={})
    records = first.directory.records()
    kept = [r for r in records if r.scores["math"] >= 0.98]
    broken = [r for r in records if r.scores["math"] < 0.98]
    assert max(r.value for r in broken) > min(r.value for r in kept)
    by_value = sorted(kept, key=lambda r: -r.value)
    by_violation = sorted(broken, key=lambda r: -r.scores["math"])
    plans = earlier_plans(first.directory.run_dir, 12)
    assert plans == [record.plan for record in by_value + by_violation]


def test_a_study_that_ended_among_its_references_has_nothing_to_begin_with(toy):
    ended = toy()
    ended.directory.close()
    run_dir = ended.directory.run_dir
    message = rf"no trial of {run_dir} has a score, .*; run that study on, or name another here"
    with pytest.raises(SpecError, match=message):
        warm_start_params([run_dir], ended.space, 3)

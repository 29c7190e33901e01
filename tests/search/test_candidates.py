"""The candidates of a study, ranked by what it maximises now."""

import pytest

from searchmerge.errors import StudyError
from searchmerge.search.candidates import best_candidates, candidates
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Racing
from searchmerge.search.trials import TrialRecord, front_of
from tests.search.test_trials import plan


def none(plan):
    """Return what is known of a plan of which nothing is."""
    return {}


def test_only_plans_that_keep_the_constraint_are_candidates_where_there_are_such(toy):
    bounded = toy(sampler="tpe")
    # the best coefficients are math 0.9, code 0.2, chat 0.5; ask for more of math than that gives
    bounded.objective = Objective(
        "mean", bounded.objective.goals, constraints=(Constraint("math", "score", 0.98),)
    )
    trials = bounded.run(40, racing=Racing())
    assert all(set(t.constraints) == {"math at least 0.98"} for t in trials)
    best = best_candidates(
        candidates(bounded.directory.records(), bounded.objective), 40, [], none
    )
    assert 0 < len(best) < 40
    assert all(record.scores["math"] >= 0.98 for record in best)
    values = [bounded.objective.scalar(record.scores) for record in best]
    assert values == sorted(values, reverse=True)


def test_a_study_of_several_objectives_keeps_its_front_under_racing(toy):
    several = toy(sampler="random", n_objectives=3)
    several.objective = Objective("tasks", several.objective.goals)
    trials = several.run(30, racing=Racing())
    assert {len(trial.values) for trial in trials} == {3}
    scored = candidates(several.directory.records(), several.objective)
    full = [record for record in scored if record.is_full]
    assert 0 < len(full) < 30
    # the front of all trials, each scored in full without racing, is what was scored in full here
    unraced = toy(sampler="random", n_objectives=3, run_dir="unraced")
    unraced.objective = several.objective
    unraced.run(30)
    front = front_of(unraced.directory.records())
    assert [r.number for r in front_of(full)] == [r.number for r in front]
    [picked] = best_candidates(full, 1, [], none)
    assert picked.number in {record.number for record in front}


def test_what_is_picked_from_the_front_may_be_changed_later():
    goals = {"math": Goal(), "code": Goal()}
    by_mean, by_worst = (Objective("tasks", goals, pick=pick) for pick in ("mean", "worst"))
    scores = [{"math": 0.9, "code": 0.5}, {"math": 0.6, "code": 0.65}]
    kept = [TrialRecord(i, plan(i)).judged(by_mean, own) for i, own in enumerate(scores)]
    for objective, picked in ((by_mean, 0), (by_worst, 1)):
        assert best_candidates(candidates(kept, objective), 1, [], none)[0].number == picked


def test_failed_trials_and_references_are_no_candidates():
    goals = {"math": Goal()}
    objective = Objective("mean", goals)
    records = [
        TrialRecord(0, plan(0), "TIES").judged(objective, {"math": 0.9}),
        TrialRecord(1, plan(1), failure="NaN logits"),
    ]
    scored = candidates(records, objective)
    assert [record.number for record in scored] == [0]
    with pytest.raises(StudyError, match="no trial but the references was scored"):
        best_candidates(scored, 3, [plan(0)], none)

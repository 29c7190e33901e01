"""The candidates of a study, ranked by what it maximises now."""

import pytest

from searchmerge.plan import WHOLE, Groups, MergePlan
from searchmerge.search.candidates import best_candidates, candidates
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Racing
from searchmerge.search.references import reference_plans
from searchmerge.search.trials import TrialRecord, front_of
from tests.search.test_trials import plan
from tests.toy import EXPERTS


def equal(method, coefficient, groups=WHOLE, **settings):
    """Return the plan whose coefficients are all one number."""
    rows = ((coefficient,) * len(EXPERTS),) * len(groups)
    return MergePlan(method, EXPERTS, {"coefficient": rows}, groups, settings)


SAME_AS_THE_AVERAGE = {
    "as itself": equal("linear", 1.0),
    "another scale": equal("linear", 0.5),
    "a slope of 0": equal("linear", 1.0, depth_slope=0.0),
    "a row for each half": equal("linear", 1.0, Groups(depth=2)),
    "a row for each tensor": equal("task_arithmetic", 1 / 3, Groups.of_tensors(["a", "b"])),
    "task arithmetic": equal("task_arithmetic", 1 / 3),
}


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
        TrialRecord(0, plan(0.5), "TIES").judged(objective, {"math": 0.9}),
        TrialRecord(1, plan(1), failure="NaN logits"),
    ]
    scored = candidates(records, objective)
    assert [record.number for record in scored] == [0]
    assert best_candidates(scored, 3, [plan(0.5)], none) == []
    assert best_candidates(scored, 3, [plan(0.6)], none) == scored


@pytest.mark.parametrize("is_written", list(SAME_AS_THE_AVERAGE))
def test_a_reference_that_is_written_otherwise_takes_no_place(is_written):
    """Nor does it keep a merge that breaks a constraint from one, as no found merge keeps it."""
    objective = Objective(
        "mean", {"math": Goal()}, constraints=(Constraint("math", "score", 0.5),)
    )
    plans = [SAME_AS_THE_AVERAGE[is_written], plan(0.5), plan(0.8)]
    records = [
        TrialRecord(i, merge).judged(objective, {"math": score})
        for i, (merge, score) in enumerate(zip(plans, (0.9, 0.4, 0.3), strict=True))
    ]
    references = reference_plans(EXPERTS).values()
    assert [r.number for r in best_candidates(records, 2, references, none)] == [1, 2]


def test_a_merge_that_answers_as_a_reference_does_gets_a_place_that_is_left():
    objective = Objective("mean", {"math": Goal()})
    answers = {0.1: (1.0, 0.0), 0.3: (1.0, 0.0), 0.5: (0.0, 1.0)}
    known = {plan(n).digest: {("math", "select", 0): its} for n, its in answers.items()}
    scored = [
        TrialRecord(i, plan(n)).judged(objective, {"math": 0.5}) for i, n in ((0, 0.3), (1, 0.5))
    ]
    for n_best, numbers in ((1, [1]), (2, [0, 1])):
        best = best_candidates(scored, n_best, [plan(0.1)], lambda p: known[p.digest])
        assert [record.number for record in best] == numbers

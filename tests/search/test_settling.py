"""What was stopped early goes on after the search, and the best are completed."""

import pytest

from searchmerge.plan import MergePlan
from searchmerge.search.directory import plan_file
from searchmerge.search.racing import Racing
from searchmerge.search.references import reference_plans
from searchmerge.search.searched import Range
from searchmerge.search.settling import Settling
from searchmerge.search.space import Alternative, SearchSpace
from tests.search.conftest import Recorder
from tests.toy import EXPERTS, ToyEvaluator


def settling(study):
    runner, objective = study.runner(), study.objective
    return Settling(study.directory, runner, study.observer, objective, Racing(), None)


def settle(study, **how):
    """Go on with what may win, as is done after a search; return what is stopped for good."""
    try:
        return settling(study).settle(**how)
    finally:
        study.directory.close()


LOOSE = Racing(p_threshold=0.45, min_blocks=3)
"""Stops what it should not."""


def test_after_the_search_trials_go_on_that_may_win_by_what_was_learnt_since(toy):
    study = toy(sampler="random")
    study.run(30, racing=LOOSE)
    before = [r for r in study.directory.records() if not r.is_full]
    again = toy(sampler="random")
    settled = settle(again)
    after = {r.number: r for r in again.directory.records()}
    completed = [r for r in before if after[r.number].is_completed]
    assert completed
    assert {r.number for r in settled.typical} <= {r.number for r in before if r not in completed}
    assert settled.read.keys() == {r.plan.digest for r in after.values()}
    best = max(r.value for r in after.values() if r.is_full)
    full = toy(sampler="random", run_dir="full")
    assert best == max(trial.value for trial in full.run(30))
    assert again.observer.phases[0][0] == "going on with what may win"


def test_a_study_that_is_settled_has_nothing_more_to_score(toy):
    toy(sampler="random").run(30, racing=LOOSE)
    first = settle(toy(sampler="random"))
    study = toy(sampler="random")
    assert settle(study) == first
    assert study.evaluator.scored == []
    assert study.observer.phases == []


def test_where_the_search_was_ended_nothing_goes_on(toy):
    toy(sampler="random").run(30, racing=LOOSE)
    study = toy(sampler="random")
    settle(study, goes_on=False)
    assert study.evaluator.scored == []
    assert study.observer.phases == []


def test_what_cannot_be_scored_does_not_go_on_for_ever(toy):
    toy(sampler="random").run(30, racing=LOOSE)
    study = toy(sampler="random", evaluator=ToyEvaluator(fails=lambda c: c[1] > 0.3))
    settle(study)
    assert any(r.is_completed for r in study.directory.records())
    again = toy(sampler="random")
    settle(again)  # the cause is mended
    n_completed = [sum(r.is_completed for r in s.directory.records()) for s in (study, again)]
    assert n_completed[0] <= n_completed[1]
    assert len(again.evaluator.scored) > 0


def test_settling_that_was_interrupted_goes_on_where_it_was(toy, tmp_path):
    for name in ("whole", "cut"):
        toy(run_dir=name).run(30, racing=LOOSE)
    whole = toy(run_dir="whole")
    settle(whole)
    with pytest.raises(KeyboardInterrupt):
        study = toy(run_dir="cut")
        study.observer = Recorder(interrupt_at=2)
        settle(study)
    study = toy(run_dir="cut")
    settle(study)
    completed = [
        {r.number for r in run.directory.records() if r.is_completed} for run in (whole, study)
    ]
    assert completed[0] == completed[1] != set()


def test_a_plan_that_was_proposed_twice_is_completed_for_both(toy):
    values = {"coefficient": Range(0.0, 1.0, per="all", step=0.25)}
    coarse = SearchSpace(EXPERTS, [Alternative("c", "task_arithmetic", values=values)])
    study = toy(space=coarse)
    study.run(24, racing=LOOSE, references={})
    again = toy(space=coarse)
    settle(again)
    completed = {}
    for record in again.directory.records():
        completed.setdefault(record.plan.digest, []).append(record.is_full)
    assert any(len(its) > 1 for its in completed.values())
    assert all(len(set(its)) == 1 for its in completed.values())


def test_a_failed_trial_is_not_completed_with_another_of_its_plan(toy):
    values = {"coefficient": Range(0.0, 1.0, per="all", step=0.25)}
    coarse = SearchSpace(EXPERTS, [Alternative("c", "task_arithmetic", values=values)])
    seen = []

    def fails_once(coefficients):
        seen.append(coefficients)
        return seen.count(coefficients) == 1 and len(seen) > 1

    study = toy(space=coarse, evaluator=ToyEvaluator(fails=fails_once))
    study.run(24, racing=LOOSE, references={})
    failed = [r.number for r in study.directory.records() if r.value is None]
    again = toy(space=coarse)
    settle(again)
    records = {r.number: r for r in again.directory.records()}
    assert failed
    assert not any(records[number].is_full for number in failed)


# --- The best are completed ---------------------------------------------------------------------


def complete(study, n_best, **how):
    """Return the best plans, and what is believed of all that were scored in full."""
    published = reference_plans(EXPERTS).items()
    references = {name: plan for name, plan in published if study.board.is_full(plan, "select")}
    try:
        return settling(study).complete_the_best(references, n_best, **how)
    finally:
        study.directory.close()


def is_predicted(record):
    return record.value is not None and not record.is_full


@pytest.mark.parametrize("goes_on", [True, False])
def test_no_plan_is_among_the_best_by_a_prediction(toy, goes_on):
    toy().run(30, racing=LOOSE)
    study = toy()
    before = {r.name for r in study.directory.records() if is_predicted(r)}
    best, evidence = complete(study, 9, goes_on=goes_on)
    after = {r.name: r for r in study.directory.records()}
    assert len(best) == 9
    assert before & best.keys()
    assert all(after[name].is_full for name in best)
    believed = dict(zip(evidence.names, evidence.values, strict=True))
    assert believed.keys() >= best.keys()
    values = [believed[name] for name in best]
    assert values == sorted(values, reverse=True)
    for name, plan in best.items():
        assert MergePlan.from_yaml(plan_file(study.directory.run_dir, name)) == plan
    titles = {title for title, *_ in study.observer.phases}
    assert titles == {"completing the best", *(["going on with what may win"] * goes_on)}


def test_what_was_completed_is_not_scored_again(toy):
    toy().run(30, racing=LOOSE)
    best, evidence = complete(toy(), 9, goes_on=True)
    study = toy()
    again, believed = complete(study, 9, goes_on=True)
    assert again == best
    assert dict(zip(believed.names, believed.values, strict=True)) == dict(
        zip(evidence.names, evidence.values, strict=True)
    )
    assert study.evaluator.scored == []
    assert study.observer.phases == []


def test_best_plans_that_cannot_be_completed_are_left_out(toy):
    toy().run(30, racing=LOOSE)
    asked = []
    study = toy(evaluator=ToyEvaluator(fails=lambda coefficients: asked.append(coefficients) or 1))
    full = {r.name for r in study.directory.records() if r.is_full}
    best, _ = complete(study, 9, goes_on=False)
    assert best
    assert best.keys() <= full
    titles = [title for title, *_ in study.observer.phases]
    assert titles == ["completing the best"] * 2  # the next best in their stead, and no others


def test_the_next_best_is_completed_in_place_of_one_that_cannot_be(toy):
    toy().run(30, racing=LOOSE)
    study = toy()
    known = {r.name: r for r in study.directory.records()}
    wanted, _ = complete(study, 9, goes_on=False)
    first = next(name for name in wanted if is_predicted(known[name]))
    left_out, asked = known[first].plan.values["coefficient"][0], []

    def fails(coefficients):
        asked.append(coefficients)
        return coefficients == left_out

    toy(run_dir="other").run(30, racing=LOOSE)
    other = toy(run_dir="other", evaluator=ToyEvaluator(fails=fails))
    best, _ = complete(other, 9, goes_on=True)
    assert len(best) == 9
    assert first not in best
    assert asked.count(left_out) == 1  # once, however often the rest is settled

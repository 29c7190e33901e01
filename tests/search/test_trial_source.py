"""Trials that fail, are left behind, or end run after run."""

from dataclasses import replace

import pytest
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.budget import StudyClock
from searchmerge.search.directory import BEST_SO_FAR, plan_file
from searchmerge.search.racing import Racing
from tests.search.conftest import OPTIMUM, Recorder
from tests.toy import ToyEvaluator


def test_a_trial_that_was_running_keeps_its_number_params_and_scores(toy):
    class Dies(ToyEvaluator):
        def score(self, model, task, examples):
            if len(self.scored) == 100:
                raise KeyboardInterrupt
            return super().score(model, task, examples)

    with pytest.raises(KeyboardInterrupt):
        toy(evaluator=Dies()).run(10)
    first = toy()
    [running] = first.directory.trials(TrialState.RUNNING)
    known = set(first.directory.scores.get(first.space.plan(running.params)))
    trials = first.run(10)
    assert trials[running.number].params == running.params
    assert trials[running.number].state == TrialState.COMPLETE
    again = [
        examples
        for coefficients, _, examples in first.evaluator.scored
        if coefficients == tuple(running.params.values())
    ]
    assert known
    assert len(again) == 15 - len(known)


def test_a_study_whose_first_trials_all_fail_stops_with_the_reason(toy):
    evaluator = ToyEvaluator(fails=lambda c: True)
    with pytest.raises(StudyError, match=r"the first 5 trials all failed; the first: .*NaN"):
        toy(evaluator=evaluator).run(50)


def test_the_best_plan_of_earlier_runs_is_written_where_a_kill_left_another(toy):
    class Dies(ToyEvaluator):
        def score(self, model, task, examples):
            raise KeyboardInterrupt

    study = toy()
    study.run(10)
    file = plan_file(study.directory.run_dir, BEST_SO_FAR)
    best = MergePlan.from_yaml(file)
    assert study.directory.records()[0].plan != best
    for leave in (lambda: study.directory.records()[0].plan.to_yaml(file), file.unlink):
        leave()
        with pytest.raises(KeyboardInterrupt):
            toy(evaluator=Dies()).run(20)
        assert MergePlan.from_yaml(file) == best


def test_a_candidate_that_cannot_be_scored_fails_alone(toy):
    evaluator = ToyEvaluator(fails=lambda c: c == (0.0, 1.0, 0.0))
    study = toy(evaluator=evaluator)
    trials = study.run(8)
    assert [t.state.name for t in trials].count("FAIL") == 1
    assert trials[2].user_attrs["failure"].endswith("has NaN logits")
    assert study.observer.trials[2].failure == trials[2].user_attrs["failure"]


def test_a_trial_that_ends_run_after_run_abruptly_fails_and_the_study_goes_on(toy):
    class Dies(ToyEvaluator):
        def score(self, model, task, examples):
            if model.coefficients == (0.0, 1.0, 0.0):
                raise KeyboardInterrupt
            return super().score(model, task, examples)

    for _ in range(3):
        study = toy(evaluator=Dies())
        with pytest.raises(KeyboardInterrupt):
            study.run(8)
        study.directory.begin_run()  # as a killed run leaves it
    trials = toy(evaluator=Dies()).run(8)
    assert [trial.state.name for trial in trials].count("COMPLETE") == 7
    assert trials[2].user_attrs["failure"] == "3 runs ended abruptly while they were at it"


def test_a_trial_during_which_runs_were_stopped_by_a_signal_goes_on(toy):
    class Stopped(ToyEvaluator):
        def score(self, model, task, examples):
            raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            toy(evaluator=Stopped()).run(8)
    assert {trial.state.name for trial in toy().run(8)} == {"COMPLETE"}


def test_trials_that_were_stopped_did_not_fail(toy):
    """All lose against a published plan, so that none is scored in full before one fails."""
    study = toy(evaluator=ToyEvaluator(fails=lambda coefficients: coefficients[2] > 0.8))
    study.runner({}).score_plans("references", {"TIES": OPTIMUM}, "select")
    study.run(30, racing=Racing(0.3, min_blocks=3), references={"TIES": OPTIMUM})
    records = toy().directory.records()
    assert not any(r.is_full for r in records)
    failed = [r.number for r in records if r.value is None]
    assert failed[-1] >= 5
    assert len(failed) < len(records) == 30


# --- Failed trials that are tried again ---------------------------------------------------------


def is_far(coefficients):
    """Return whether a plan is one that fails until what makes it fail is mended."""
    return coefficients[0] + coefficients[1] > 1.2


def mended(toy, fails=lambda coefficients: False):
    """Return a study whose failed trials are enqueued again, and how many they are."""
    study = toy(evaluator=ToyEvaluator(fails=fails))
    return study, study.directory.enqueue_failed()


def failed_in(trials):
    return [trial for trial in trials if trial.state == TrialState.FAIL]


def test_failed_trials_are_tried_again_once_and_the_budget_is_of_what_is_scored(toy):
    before = toy(evaluator=ToyEvaluator(fails=is_far)).run(16)
    failed = failed_in(before)
    assert len(failed) > 2
    assert len(toy().run(16)) == 16  # unasked, none is
    study, n_failed = mended(toy)
    assert n_failed == len(failed)
    trials = study.run(16)
    assert ("search", 16, 16 - n_failed) in study.observer.phases
    assert trials[:16] == before
    assert [trial.params for trial in trials[16:]] == [trial.params for trial in failed]
    records = study.directory.records()
    assert [r.repeats for r in records if r.number >= 16] == [t.number for t in failed]
    assert len(records) == sum(record.is_full for record in records) == 16
    again, n_failed = mended(toy)
    assert n_failed == 0
    assert again.run(16) == trials


def test_only_what_fails_still_is_tried_a_third_time(toy):
    def is_further(coefficients):
        return coefficients[0] + coefficients[1] > 1.4

    first = failed_in(toy(evaluator=ToyEvaluator(fails=is_far)).run(16))
    study, _ = mended(toy, is_further)
    second = failed_in(study.run(16)[16:])
    assert 0 < len(second) < len(first)
    assert len(toy().run(16)) == 16 + len(first)
    study, n_failed = mended(toy)
    assert n_failed == len(second)
    records = {record.number: record for record in study.directory.records()}
    study.run(16)
    third = [r for r in study.directory.records() if r.number not in records]
    assert [record.repeats for record in third] == [trial.number for trial in second]


def test_a_failed_reference_is_tried_again_as_what_it_is(toy):
    toy(evaluator=ToyEvaluator(fails=lambda c: c == (0.0, 1.0, 0.0))).run(8)
    study, n_failed = mended(toy)
    assert n_failed == 1
    again = study.run(8)[8]
    assert again.user_attrs["kind"] == study.directory.records()[-1].kind == "expert code"


@pytest.mark.parametrize("spent", [{"timeout_s": 0.0}, {"patience": 1}])
def test_failed_trials_are_tried_again_whatever_is_left_of_the_budget(toy, spent):
    failed = failed_in(toy(evaluator=ToyEvaluator(fails=is_far)).run(16))
    study, _ = mended(toy)
    again = study.run(None, **spent)[16 : 16 + len(failed)]  # more, where one is the best
    assert [trial.params for trial in again] == [trial.params for trial in failed]


def test_what_was_to_be_tried_again_when_a_run_was_stopped_is_by_the_next_one(toy):
    failed = failed_in(toy(evaluator=ToyEvaluator(fails=is_far)).run(16))
    study, _ = mended(toy)
    with pytest.raises(KeyboardInterrupt):
        study.run(16, observer=Recorder(interrupt_at=1))
    study, n_failed = mended(toy)
    assert n_failed == 0
    trials = study.run(16)
    assert len(trials) == 16 + len(failed)
    assert [trial.params for trial in trials[16:]] == [trial.params for trial in failed]
    assert {record.value is None for record in study.directory.records()} == {False}


def test_a_study_whose_first_trials_all_failed_goes_on_once_that_is_mended(toy):
    def never(coefficients):
        return True

    told = "all failed; the first: .* if that is mended, the same `searchmerge run` with --retry"
    with pytest.raises(StudyError, match=f"first 5 trials {told}"):
        toy(evaluator=ToyEvaluator(fails=never)).run(8)
    study, n_failed = mended(toy, never)
    assert n_failed == 5
    with pytest.raises(StudyError, match=f"first 5 trials {told}"):
        study.run(8)
    study, _ = mended(toy)
    assert len(study.run(8)) == 5 + 5 + 8
    assert sum(record.is_full for record in study.directory.records()) == 8


def test_a_trial_that_was_given_up_as_runs_ended_abruptly_is_tried_again_from_the_start(toy):
    class Dies(ToyEvaluator):
        def score(self, model, task, examples):
            raise KeyboardInterrupt

    toy().run(4)
    for _ in range(3):
        study = toy(evaluator=Dies())
        with pytest.raises(KeyboardInterrupt):
            study.run(8)
        study.directory.begin_run()  # as a killed run leaves it
    [failed] = failed_in(toy().run(8))
    study, _ = mended(toy)
    assert study.run(8)[8].params == failed.params
    assert all(record.is_full for record in study.directory.records())


def test_a_refined_trial_that_failed_is_tried_again_and_takes_nothing_of_the_budget(toy):
    toy().run(8)
    [failed] = run_refined(toy(evaluator=ToyEvaluator(fails=lambda coefficients: True)))
    assert failed.failure
    study, n_failed = mended(toy)
    assert n_failed == 1
    keys = study.directory.refined_keys()
    study.run(8)
    [record] = [record for record in toy().directory.records() if record.refines]
    assert (record.number, record.name, record.plan) == (9, "refined trial 3", OPTIMUM)
    assert record.is_full
    assert record.repeats == failed.number
    study = toy()
    assert study.directory.refined_keys() == keys
    study.directory.enqueue_refined("trial 3", POOR, {"key": "another"})
    assert study.directory.next_due().user_attrs["refines"] == "trial 3 (2)"


# --- Refined trials ---------------------------------------------------------------------------

POOR = replace(OPTIMUM, values={"coefficient": ((0.5, 0.2, 0.0),) * 2})


def run_refined(study, plans=(OPTIMUM,), racing=None, evaluator=None):
    """Enqueue refined plans after a search and run them, as the stage of refinement does."""
    for i, plan in enumerate(plans):
        study.directory.enqueue_refined("trial 3", plan, {"key": str(i)})
    clock = StudyClock(study.directory.refining)
    try:
        study.runner().run_refined(study.objective, racing, clock, None)
    finally:
        study.directory.close()
    return [record for record in study.directory.records() if record.refines]


def told(study):
    """Return all that was told of the trials of the space."""
    records = [record for record in study.directory.records() if not record.refines]
    what = "plan", "kind", "scores", "values", "violations", "stopped_after", "se"
    return [tuple(getattr(record, name) for name in what) for record in records]


def test_a_refined_trial_runs_though_the_budget_is_used_up(toy):
    toy().run(8)
    study = toy()
    [record] = run_refined(study)
    assert (record.number, record.name, record.plan) == (8, "refined trial 3", OPTIMUM)
    assert record.is_full
    assert record.se > 0
    assert [shown.name for shown in study.observer.trials] == [record.name]
    trial = study.directory.study.trials[8]
    assert (trial.state, trial.params) == (TrialState.COMPLETE, {})
    assert study.directory.refining.elapsed_s > 0


def test_refined_trials_take_nothing_of_the_budget(toy):
    toy().run(8)
    run_refined(toy(), [OPTIMUM, POOR])
    before = toy().directory.searching.elapsed_s
    study = toy()
    assert len(study.run(8)) == 10  # all are there: nothing is asked
    assert study.directory.searching.elapsed_s == pytest.approx(before, abs=1.0)
    study = toy()
    study.run(12)
    assert len(told(study)) == 12
    assert ("search", 12, 8) in study.observer.phases


@pytest.mark.parametrize("budget", [{"n_trials": 40}, {"n_trials": None, "patience": 12}])
def test_a_refined_plan_that_is_better_stops_no_trial_of_the_space(toy, budget):
    for name in ("plain", "refined"):
        toy(run_dir=name).run(12, racing=Racing())
    [flattered] = run_refined(toy(run_dir="refined"), racing=Racing())
    runs = {name: toy(run_dir=name) for name in ("plain", "refined")}
    for study in runs.values():
        study.run(**budget, racing=Racing())
    assert told(runs["refined"]) == told(runs["plain"])
    assert flattered.value > max(r.value for r in runs["plain"].directory.records())
    files = [plan_file(s.directory.run_dir, BEST_SO_FAR).read_text() for s in runs.values()]
    assert files[0] == files[1]


def test_a_trial_that_was_completed_after_the_search_lets_none_go_on_that_had_ended(toy):
    budget = {"n_trials": None, "patience": 8, "racing": Racing()}
    toy().run(**budget)
    study = toy()
    *_, stopped = [r for r in study.directory.records() if r.stopped_after is not None]
    study.runner({}).score_plans("completing", {stopped.name: stopped.plan}, "select")
    best = dict.fromkeys(stopped.scores, 2.0)
    study.directory.keep_completed(stopped.judged(study.objective, best))
    n_before = len(study.directory.trials())
    assert len(study.run(**budget)) == n_before


def test_a_refined_trial_that_has_not_collapsed_is_scored_in_full(toy):
    toy().run(12, racing=Racing())
    study = toy()
    poor, best = run_refined(study, [POOR, OPTIMUM], racing=Racing())
    assert poor.value < best.value
    assert poor.is_full
    assert best.is_full


def test_of_one_plan_refined_twice_each_has_a_name_of_its_own(toy):
    toy().run(8)
    names = [record.name for record in run_refined(toy(), [OPTIMUM, POOR])]
    assert names == ["refined trial 3", "refined trial 3 (2)"]


@pytest.mark.parametrize("n_calls", [0, 1, 4])
def test_a_refined_trial_that_was_cut_off_goes_on_where_it_was(toy, n_calls):
    class Dies(ToyEvaluator):
        def score(self, model, task, examples):
            if len(self.scored) == n_calls:
                raise KeyboardInterrupt
            return super().score(model, task, examples)

    toy().run(8)
    first = toy(evaluator=Dies())
    with pytest.raises(KeyboardInterrupt):
        run_refined(first)
    study = toy()
    [record] = run_refined(study, [])
    assert (record.number, record.plan, record.is_full) == (8, OPTIMUM, True)
    assert len(first.evaluator.scored) + len(study.evaluator.scored) <= 15 + 3
    assert len(study.directory.study.trials) == 9


def test_a_refined_trial_that_was_left_in_the_queue_runs_before_the_search_goes_on(toy):
    toy().run(8)
    toy().directory.enqueue_refined("trial 3", OPTIMUM, {"key": "a"})
    study = toy()
    study.run(10)
    assert [bool(record.refines) for record in study.observer.trials] == [True, False, False]


def test_a_refined_trial_that_cannot_be_scored_fails_alone(toy):
    toy().run(8)
    study = toy(evaluator=ToyEvaluator(fails=lambda c: c == (0.9, 0.2, 0.5)))
    failed, scored = run_refined(study, [OPTIMUM, POOR])
    assert failed.failure.endswith("has NaN logits")
    assert scored.is_full

"""Trials that fail, are left behind, or end run after run."""

import pytest
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.directory import BEST_SO_FAR, plan_file
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

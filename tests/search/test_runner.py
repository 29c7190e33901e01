"""The whole of a study without models, in one process."""

import pytest
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.search.racing import Racing
from searchmerge.search.runner import RESULT
from tests.search.conftest import Recorder
from tests.toy import ToyEvaluator


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_search_finds_the_coefficients_of_a_known_optimum(toy, sampler):
    trials = toy(sampler=sampler).run(40)
    best = max(trials, key=lambda trial: trial.value)
    found = [best.params[f"coefficient.{task}"] for task in ("math", "code", "chat")]
    assert found == pytest.approx([0.9, 0.2, 0.5], abs=0.3)


def test_references_that_are_in_the_space_are_the_first_trials(toy):
    trials = toy().run(8)
    kinds = [trial.user_attrs.get("kind") for trial in trials]
    assert kinds[:5] == ["base", "expert math", "expert code", "expert chat", "task arithmetic"]
    assert kinds[5:] == [None] * 3
    assert trials[0].params == {f"coefficient.{t}": 0.0 for t in ("math", "code", "chat")}


@pytest.mark.parametrize("interrupted_at", [1, 4, 7])
def test_an_interrupted_study_goes_on_with_the_same_trials(toy, tmp_path, interrupted_at):
    whole = [(t.number, t.params, t.value) for t in toy().run(10)]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(KeyboardInterrupt):
        toy().run(10, observer=Recorder(interrupt_at=interrupted_at))
    resumed = toy()
    trials = resumed.run(10)
    assert [t.number for t in trials] == list(range(10))
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert len(resumed.observer.trials) == 10 - interrupted_at
    assert [t.params for t in trials[:interrupted_at]] == [p for _, p, _ in whole[:interrupted_at]]


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


def test_a_plan_that_was_scored_costs_nothing(toy):
    first = toy()
    first.run(10)
    n_scored = len(first.evaluator.scored)
    assert n_scored == 10 * 15
    second = toy()
    second.run(10)
    assert second.evaluator.scored == []


def test_a_candidate_that_cannot_be_scored_fails_alone(toy):
    evaluator = ToyEvaluator(fails=lambda c: c == (0.0, 1.0, 0.0))
    study = toy(evaluator=evaluator)
    trials = study.run(8)
    assert [t.state.name for t in trials].count("FAIL") == 1
    assert trials[2].user_attrs["failure"].endswith("has NaN logits")
    assert study.observer.trials[2].note == trials[2].user_attrs["failure"]


def test_a_study_whose_first_trials_all_fail_stops_with_the_reason(toy):
    evaluator = ToyEvaluator(fails=lambda c: True)
    with pytest.raises(StudyError, match=r"the first 5 trials all failed; the last: .*NaN logits"):
        toy(evaluator=evaluator).run(50)


def test_a_changed_study_is_not_gone_on_with(toy):
    toy(spec={"space": {"density": [0.1, 0.5]}}).run(1)
    with pytest.raises(StudyError, match=r"space\.density was \[0\.1, 0\.5\] and is now \[0\.2\]"):
        toy(spec={"space": {"density": [0.2]}})


def test_racing_saves_examples_and_tells_every_trial(toy):
    raced = toy(sampler="random")
    trials = raced.run(30, racing=Racing())
    partial = [t for t in trials if t.user_attrs[RESULT]["partial"] is not None]
    assert len(trials) == 30
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert len(partial) > 10
    assert len(raced.evaluator.scored) < 30 * 15 * 0.9
    best = max((t for t in trials if t not in partial), key=lambda t: t.value)
    assert best.value == max(t.value for t in trials if t not in partial)
    assert max(t.value for t in partial) < best.value


def test_patience_ends_a_study_on_a_plateau(toy):
    trials = toy().run(None, patience=6)
    values = [t.value for t in trials]
    assert len(trials) == values.index(max(values)) + 1 + 6


def test_timeout_is_over_all_runs_of_the_study(toy):
    first = toy()
    first.directory.set_elapsed(100.0)
    trials = first.run(None, timeout_s=50.0)
    assert {trial.state for trial in trials} == {TrialState.WAITING}

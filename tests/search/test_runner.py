"""The whole of a study without models, in one process."""

import shutil

import pytest
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.search.objective import Objective
from searchmerge.search.racing import Racing
from searchmerge.search.references import reference_plans
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from tests.search.conftest import Recorder, pilot_schedule
from tests.toy import EXPERTS, ToyEvaluator


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
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(KeyboardInterrupt):
        toy().run(10, observer=Recorder(interrupt_at=interrupted_at))
    resumed = toy()
    trials = resumed.run(10)
    assert [t.number for t in trials] == list(range(10))
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert len(resumed.observer.trials) == 10 - interrupted_at
    assert [t.params for t in trials[:interrupted_at]] == [p for _, p, _ in whole[:interrupted_at]]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2", "qmc", "cma_es"])
def test_a_resumed_study_proposes_nothing_twice(toy, sampler):
    toy(sampler=sampler).run(6, references={})
    trials = toy(sampler=sampler).run(14, references={})
    asked = [tuple(t.params.values()) for t in trials]
    assert len(set(asked)) == 14


def test_a_plan_that_was_scored_costs_nothing(toy):
    first = toy()
    first.run(10)
    n_scored = len(first.evaluator.scored)
    assert n_scored == 10 * 15
    second = toy()
    second.run(10)
    assert second.evaluator.scored == []


def test_a_changed_study_is_not_gone_on_with(toy):
    toy(spec={"space": {"density": [0.1, 0.5]}}).run(1)
    with pytest.raises(StudyError, match=r"space\.density was \[0\.1, 0\.5\] and is now \[0\.2\]"):
        toy(spec={"space": {"density": [0.2]}})


def test_a_plan_that_was_scored_before_costs_nothing(toy):
    values = {"coefficient": Range(0.0, 1.0, per="all", step=0.5)}
    coarse = SearchSpace(EXPERTS, [Alternative("c", "task_arithmetic", values=values)])
    study = toy(space=coarse)
    trials = study.run(20, references={})
    assert len(trials) == 20
    assert len({trial.params["coefficient"] for trial in trials}) == 3
    assert len(study.merger.plans) == 3


def test_patience_ends_a_study_on_a_plateau(toy):
    trials = toy().run(None, patience=6)
    values = [t.value for t in trials]
    assert len(trials) == values.index(max(values)) + 1 + 6


def test_references_use_up_no_patience(toy):
    study = toy()
    study.run(None, patience=1)
    kinds = [record.kind for record in study.directory.records()]
    assert kinds[:2] == ["base", "expert math"]
    assert kinds[-1] == ""


def test_timeout_is_over_all_runs_of_the_study(toy):
    first = toy()
    first.directory.searching.set_elapsed(100.0)
    trials = first.run(None, timeout_s=50.0)
    assert {trial.state for trial in trials} == {TrialState.WAITING}


def test_racing_saves_examples_and_tells_every_trial(toy):
    raced = toy(sampler="random")
    trials = raced.run(30, racing=Racing())
    records = raced.directory.records()
    stopped = [r for r in records if r.stopped_after is not None]
    assert len(trials) == len(records) == 30
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert len(stopped) > 10
    assert len(raced.evaluator.scored) < 30 * 15 * 0.9
    # what was stopped would not have won: it is scored in full here, without racing
    full = toy(sampler="random", run_dir="full")
    values = [t.value for t in full.run(30)]
    assert [t.params for t in full.directory.study.trials] == [t.params for t in trials]
    best = max(r.value for r in records if r.is_full)
    assert best == max(values)
    assert max(values[r.number] for r in stopped) < best


def test_the_worst_task_can_be_what_is_maximised(toy):
    careful = toy(sampler="tpe")
    careful.objective = Objective("worst", careful.objective.goals)
    trials = careful.run(60, racing=Racing())
    best = max((r for r in careful.directory.records() if r.is_full), key=lambda r: r.value)
    assert best.value == pytest.approx(min(best.scores.values()))
    assert best.value > trials[0].value


def test_an_observer_is_told_which_trials_were_better_than_all_before(toy):
    study = toy()
    trials = study.run(12)
    best = [float("-inf")]
    for trial, (record, is_best) in zip(trials, study.observer.told, strict=True):
        assert record.number == trial.number
        assert is_best == (trial.value > best[-1])
        best.append(max(best[-1], trial.value))


def test_references_decide_which_examples_come_first_and_are_not_scored_again(toy):
    study = toy(schedule=pilot_schedule())
    runner = study.runner()
    scored = runner.score_references()
    assert list(scored) == list(reference_plans(EXPERTS))
    n_scored = len(study.evaluator.scored)
    select = runner.board.schedule.blocks["select"]
    assert runner.score_references() == scored
    assert runner.board.schedule.blocks["select"] == select
    assert len(study.evaluator.scored) == n_scored
    study.directory.close()


class Uneven(ToyEvaluator):
    """Scores one expert on every fifth example otherwise than all other plans."""

    def score(self, model, task, examples):
        values = super().score(model, task, examples)
        if model.coefficients != (0.0, 1.0, 0.0):
            return values
        return tuple(v - (e % 5 == 0) for v, e in zip(values, examples, strict=True))


def test_the_order_of_examples_stays_what_the_first_run_made_it(toy):
    """A reference that failed in the first run and is scored in the second does not decide."""

    def order(fails=lambda c: False, **options):
        study = toy(schedule=pilot_schedule(), evaluator=Uneven(fails=fails), **options)
        runner = study.runner()
        n_scored = len(runner.score_references())
        study.directory.close()
        return n_scored, runner.board.schedule.blocks["select"]

    n_references = len(reference_plans(EXPERTS))
    first = order(fails=lambda c: c == (0.0, 1.0, 0.0))
    second = order()
    assert [first[0], second[0]] == [n_references - 1, n_references]
    assert first[1] == second[1]
    anew = order(run_dir="other")
    assert all(block.examples[0] % 5 == 0 for [block, *_] in anew[1].values())
    assert anew[1] != first[1]

"""The whole of a study without models, in one process."""

from dataclasses import replace

import pytest
from optuna.trial import TrialState

from searchmerge.errors import SpecError, StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import inform, make_blocks, make_rounds
from searchmerge.search.candidates import best_of, candidates, front_of
from searchmerge.search.objective import Constraint, Objective
from searchmerge.search.racing import Racing
from searchmerge.search.runner import RESULT
from searchmerge.search.schedule import Schedule
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.warm_start import warm_start_params
from tests.search.conftest import Recorder
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


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2", "qmc", "cma_es"])
def test_a_resumed_study_proposes_nothing_twice(toy, sampler):
    toy(sampler=sampler).run(6, references={})
    trials = toy(sampler=sampler).run(14, references={})
    asked = [tuple(t.params.values()) for t in trials]
    assert len(set(asked)) == 14


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
    with pytest.raises(StudyError, match=r"the first 5 trials all failed; the first: .*NaN"):
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


def test_timeout_is_over_all_runs_of_the_study(toy):
    first = toy()
    first.directory.set_elapsed(100.0)
    trials = first.run(None, timeout_s=50.0)
    assert {trial.state for trial in trials} == {TrialState.WAITING}


def test_a_constraint_is_told_with_every_trial_and_only_plans_that_keep_it_are_picked(toy):
    bounded = toy(sampler="tpe")
    # the best coefficients are math 0.9, code 0.2, chat 0.5; ask for more of code than that gives
    bounded.objective = Objective(
        "mean", bounded.objective.goals, constraints=(Constraint("math", "score", 0.98),)
    )
    trials = bounded.run(40, racing=Racing())
    assert all(set(t.constraints) == {"math at least 0.98"} for t in trials)
    found = best_of(candidates(bounded.directory, bounded.schedule), bounded.objective, 40)
    assert 0 < len(found) < 40
    assert all(one.scores["math"] >= 0.98 for one in found)
    values = [bounded.objective.scalar(one.scores) for one in found]
    assert values == sorted(values, reverse=True)


def test_a_study_of_several_objectives_keeps_its_front_under_racing(toy):
    several = toy(sampler="random", n_objectives=3)
    several.objective = Objective("tasks", several.objective.goals)
    trials = several.run(30, racing=Racing())
    found = candidates(several.directory, several.schedule)
    full = [one for one in found if one.is_full]
    front = front_of(full, several.objective)
    assert 0 < len(full) < 30
    values = {one.number: several.objective.values(one.scores) for one in full}
    for trial in trials:
        assert len(trial.values) == 3
    for number, mine in values.items():
        dominated = any(
            other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
            for other in values.values()
        )
        assert (number in {one.number for one in front}) == (not dominated)
    [picked] = best_of(full, several.objective, 1)
    assert picked in front


def test_the_worst_task_can_be_what_is_maximised(toy):
    careful = toy(sampler="tpe")
    careful.objective = Objective("worst", careful.objective.goals)
    trials = careful.run(60, racing=Racing())
    best = max(
        (t for t in trials if t.user_attrs[RESULT]["partial"] is None), key=lambda t: t.value
    )
    assert best.value == pytest.approx(min(best.user_attrs[RESULT]["scores"].values()))
    assert best.value > trials[0].value


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


def test_references_decide_which_examples_come_first_and_are_not_scored_again(toy):
    surveyed = toy()
    schedule = surveyed.schedule
    blocks = {"survey": {}, "hold_out": schedule.blocks["hold_out"]}
    for task, own in schedule.blocks["select"].items():
        blocks["survey"][task] = tuple(replace(block, part="survey") for block in own)
    rounds = {"survey": make_rounds(blocks["survey"], round_blocks=3, seed=0)}
    surveyed.schedule = Schedule(blocks, rounds, 3)
    runner = surveyed.runner()
    known = runner.score_references()
    n_scored = len(surveyed.evaluator.scored)
    informed = runner.schedule
    for task, own in informed.blocks["select"].items():
        survey = blocks["survey"][task]
        assert sorted(e for b in own for e in b.examples) == sorted(
            e for b in survey for e in b.examples
        )
        assert [len(b.examples) for b in own] == [len(b.examples) for b in survey]
    store = surveyed.directory.scores
    for plan in known.values():
        assert informed.is_known(store, plan, "select")
        assert informed.scores(store, plan, "select") == pytest.approx(
            informed.scores(store, plan, "survey")
        )
    again = runner.score_references()
    assert again == known
    assert runner.schedule.blocks["select"] == informed.blocks["select"]
    assert len(surveyed.evaluator.scored) == n_scored
    surveyed.directory.close()


def test_examples_on_which_plans_differ_most_come_first():
    blocks = make_blocks("t", "survey", range(10), TaskInfo(10), 4)
    scored = [{e: float(e in wrong) for e in range(10)} for wrong in ((7, 2), (7,), (7, 2), (9,))]
    informed = inform(blocks, scored, "select")
    assert [b.examples for b in informed] == [(2, 7, 9, 0), (1, 3, 4, 5), (6, 8)]
    assert {b.part for b in informed} == {"select"}
    whole = inform(make_blocks("t", "survey", range(4), TaskInfo(4, mean=False), 2), [], "select")
    assert len(whole) == 1

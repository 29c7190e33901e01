"""What candidates are compared with: the best plan so far, or the front."""

from dataclasses import replace

import numpy as np
import pytest

from searchmerge.errors import StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import BlockScores, make_blocks
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.pick import evidence_on_select
from searchmerge.search.racing import Racing
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.search.trials import TrialRecord
from tests.search.test_trials import plan

N = 64
GOALS = {"a": Goal(), "b": Goal()}
TASKS = dict.fromkeys(GOALS, TaskInfo(N))
BLOCKS = {task: make_blocks(task, "select", range(N), TASKS[task], 8) for task in GOALS}


@pytest.fixture
def board(tmp_path):
    store = ScoreStore(tmp_path / "scores.db")
    schedule = Schedule.interleaved(TASKS, {"select": BLOCKS}, round_blocks=2, seed=0)
    yield Scoreboard(schedule, store)
    store.close()


def right(share, seed=1):
    """Return 64 values, right wherever a smaller share is right as well."""
    return (np.random.default_rng(seed).random(N) < share).astype(float)


def score(board, number, a, b, n_rounds=None):
    """Score a plan on the first rounds, or on all of them; return it."""
    values = {"a": a, "b": b}
    for blocks in board.schedule.rounds["select"][:n_rounds]:
        board.store.put(
            plan(number),
            [BlockScores(x, tuple(values[x.task][list(x.examples)].tolist())) for x in blocks],
        )
    return plan(number)


def enter(incumbents, objective, board, number, a, b):
    """Score a plan in full and enter it; return whether it is the best."""
    scored = score(board, number, a, b)
    record = TrialRecord(number, scored).judged(objective, board.scores(scored, "select"))
    return incumbents.enter(record)


def test_the_best_is_replaced_only_by_a_better_one(board):
    objective = Objective("mean", GOALS)
    incumbents = Incumbents(board, objective, Racing())
    assert incumbents.best is None
    shares = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6, 5: 0.9}
    told = [enter(incumbents, objective, board, n, right(s), right(s)) for n, s in shares.items()]
    assert told == [True, True, False, False, True]
    assert incumbents.best.number == 5


def test_a_plan_that_breaks_a_constraint_is_not_the_best_beside_one_that_keeps_it(board):
    objective = Objective("mean", GOALS, constraints=(Constraint("a", "score", 0.5),))
    incumbents = Incumbents(board, objective, Racing())
    assert enter(incumbents, objective, board, 1, right(0.3), right(0.9))
    assert enter(incumbents, objective, board, 2, right(0.6), right(0.2))
    assert not enter(incumbents, objective, board, 3, right(0.4), right(0.99))
    assert incumbents.best.number == 2


def published(board, **shares):
    """Score plans that are right as often as it says, and return them by name."""
    plans = enumerate(shares.items(), 20)
    return {name: score(board, n, right(share), right(share)) for n, (name, share) in plans}


def test_the_leader_is_the_plan_that_is_saved_where_nothing_is_held_out(board):
    """By evidence and not by value, published or found, and by constraints before all."""
    objective = Objective("mean", GOALS)
    references = published(board, base=0.3, TIES=0.6, average=0.55)
    incumbents = Incumbents(board, objective, references=references)
    assert incumbents.leader == ("TIES", references["TIES"])
    plans = dict(references)
    for number, share in ((1, 0.5), (2, 0.7), (3, 0.65)):
        enter(incumbents, objective, board, number, right(share), right(share))
        plans[f"trial {number}"] = plan(number)
        evidence = evidence_on_select(board, plans, objective)
        assert incumbents.leader == (evidence.best, plans[evidence.best])
    assert incumbents.leader == ("trial 2", plan(2))
    limited = Objective("mean", GOALS, constraints=(Constraint("b", "score", 0.5),))
    incumbents = Incumbents(board, limited, references=references)
    enter(incumbents, limited, board, 4, right(0.9), right(0.4))
    assert incumbents.leader == ("TIES", references["TIES"])


def test_a_trial_that_is_a_reference_leads_under_the_name_of_that(board):
    objective = Objective("mean", GOALS)
    references = published(board, base=0.3, TIES=0.6)
    incumbents = Incumbents(board, objective, references=references)
    enter(incumbents, objective, board, 21, right(0.6), right(0.6))
    assert references["TIES"] == plan(21)
    assert incumbents.leader == ("TIES", plan(21))


def test_before_a_merge_is_scored_nothing_leads(board):
    objective = Objective("mean", GOALS)
    references = {
        name: score(board, n, right(0.6), right(0.6))
        for n, name in enumerate(("base", "expert a"))
    }
    incumbents = Incumbents(board, objective, references=references)
    assert incumbents.leader is None
    enter(incumbents, objective, board, 21, right(0.3), right(0.3))
    assert incumbents.leader == ("base", references["base"])


def test_before_anything_is_scored_in_full_nothing_leads(board):
    references = {"TIES": score(board, 1, right(0.6), right(0.6), n_rounds=3)}
    assert Incumbents(board, Objective("mean", GOALS), references=references).leader is None


def test_a_candidate_is_stopped_where_it_cannot_win_and_its_scores_are_estimated(board):
    objective = Objective("mean", GOALS)
    incumbents = Incumbents(board, objective, Racing())
    enter(incumbents, objective, board, 1, right(0.8), right(0.8))
    enter(incumbents, objective, board, 2, right(0.7), right(0.7))
    worse = score(board, 3, right(0.3), right(0.3), n_rounds=5)
    assert not incumbents.may_win(worse)
    outcome = incumbents.outcome(worse)
    assert outcome.stopped_after == 10
    assert 0.2 < outcome.scores["a"] < 0.5
    assert 0.0 < outcome.se < 0.1
    better = score(board, 4, right(0.95), right(0.95), n_rounds=5)
    assert incumbents.may_win(better)
    full = score(board, 4, right(0.95), right(0.95))
    told, scores = incumbents.outcome(full), board.scores(full, "select")
    assert (told.scores, told.estimates, told.stopped_after) == (scores, scores, None)
    differences = [right(0.95) - right(0.8)] * 2
    variance = sum(0.25 * d.var(ddof=1) / N for d in differences)
    assert told.se == pytest.approx(np.sqrt(variance))


def test_a_candidate_races_against_published_plans_from_the_first_on(board):
    objective = Objective("mean", GOALS)
    references = published(board, base=0.2, TIES=0.8, average=0.7)
    incumbents = Incumbents(board, objective, Racing(), references=references)
    worse = score(board, 3, right(0.4), right(0.4), n_rounds=5)
    assert not incumbents.may_win(worse)
    assert incumbents.outcome(worse).stopped_after == 10
    assert incumbents.may_win(score(board, 4, right(0.95), right(0.95), n_rounds=5))
    assert incumbents.best is None
    assert enter(incumbents, objective, board, 5, right(0.5), right(0.5))  # of the trials


def test_with_several_objectives_published_plans_are_on_the_front(board):
    objective = Objective("tasks", GOALS)
    references = published(board, TIES=0.8, average=0.7)
    incumbents = Incumbents(board, objective, Racing(), references=references)
    enter(incumbents, objective, board, 1, right(0.9), right(0.5))
    assert not incumbents.may_win(score(board, 2, right(0.5), right(0.4), n_rounds=6))
    assert incumbents.may_win(score(board, 3, right(0.2), right(0.9), n_rounds=6))


def stop(incumbents, objective, board, number, share, n_rounds=5):
    """Score a plan on the first rounds and enter it as one that was stopped."""
    stopped = score(board, number, right(share), right(share), n_rounds=n_rounds)
    outcome = incumbents.outcome(stopped)
    record = TrialRecord(number, stopped, se=outcome.se, stopped_after=outcome.stopped_after)
    incumbents.enter(record.judged(objective, outcome.scores, outcome.estimates))


def test_what_was_stopped_is_predicted_anew_and_is_no_longer_once_it_is_full(board):
    objective = Objective("mean", GOALS)
    references = published(board, base=0.2, TIES=0.8, average=0.7)
    incumbents = Incumbents(board, objective, Racing(), references=references)
    for number, share in ((1, 0.4), (2, 0.6), (3, 0.05)):
        stop(incumbents, objective, board, number, share)
    assert [r.number for r in incumbents.stopped] == [1, 2]  # the third is below the base
    score(board, 1, right(0.4), right(0.4), n_rounds=7)
    again = {record.number: record for record in incumbents.predict_anew()}
    assert list(again) == [2, 1, 3]
    assert again[1].value == incumbents.outcome(plan(1)).scores["a"] / 2 + (
        incumbents.outcome(plan(1)).scores["b"] / 2
    )
    assert again[1].se < again[2].se
    enter(incumbents, objective, board, 2, right(0.6), right(0.6))
    assert [r.number for r in incumbents.stopped] == [1]
    assert incumbents.best.number == 2


def test_what_was_stopped_is_predicted_anew_though_it_seems_to_break_a_constraint(board):
    """It may keep it on the rest: whether it may win is asked of it like of the others."""
    objective = Objective("mean", GOALS, constraints=(Constraint("a", "score", 0.59),))
    references = published(board, base=0.2, TIES=0.6, average=0.5)
    incumbents = Incumbents(board, objective, Racing(), references=references)
    for number, share in ((1, 0.62), (2, 0.4)):
        stop(incumbents, objective, board, number, share)
    assert {r.number: r.is_feasible for r in incumbents.predict_anew()} == {1: True, 2: False}


def test_a_plan_that_was_stopped_twice_counts_once(board):
    objective = Objective("mean", GOALS)
    references = published(board, base=0.2, TIES=0.8, average=0.7)
    incumbents = Incumbents(board, objective, Racing(), references=references)
    stop(incumbents, objective, board, 1, 0.4)
    again = TrialRecord(2, plan(1)).judged(objective, incumbents.outcome(plan(1)).scores)
    incumbents.enter(replace(again, stopped_after=10))
    assert [r.number for r in incumbents.stopped] == [2]
    enter(incumbents, objective, board, 1, right(0.4), right(0.4))
    assert incumbents.stopped == []


def test_a_plan_that_is_published_tells_once_how_plans_differ(board):
    """As a trial it is the same plan again, which all would seem to be alike for."""
    objective = Objective("mean", GOALS)
    references = published(board, base=0.2, TIES=0.8, average=0.7)
    once = Incumbents(board, objective, Racing(), references=references)
    twice = Incumbents(board, objective, Racing(), references=references)
    for number, share in ((21, 0.8), (22, 0.7)):
        enter(twice, objective, board, number, right(share), right(share))
    candidate = score(board, 3, right(0.5), right(0.5), n_rounds=5)
    assert twice.outcome(candidate) == once.outcome(candidate)


def test_a_refined_plan_is_stopped_by_a_collapse_alone(board):
    objective = Objective("mean", GOALS)
    base = score(board, 0, right(0.5), right(0.5))
    incumbents = Incumbents(board, objective, Racing(), references={"base": base})
    enter(incumbents, objective, board, 1, right(0.8), right(0.8))
    enter(incumbents, objective, board, 2, right(0.7), right(0.7))
    worse = score(board, 3, right(0.55), right(0.55), n_rounds=6)
    assert not incumbents.may_win(worse)
    assert incumbents.may_win(worse, is_refined=True)
    collapsed = score(board, 4, right(0.1), right(0.1), n_rounds=6)
    assert not incumbents.may_win(collapsed, is_refined=True)


def test_without_racing_nothing_is_stopped(board):
    objective = Objective("mean", GOALS)
    incumbents = Incumbents(board, objective)
    enter(incumbents, objective, board, 1, right(0.9), right(0.9))
    assert incumbents.may_win(score(board, 2, right(0.0), right(0.0), n_rounds=7))
    assert incumbents.rounds() == board.schedule.rounds["select"]


def test_with_several_objectives_a_candidate_is_compared_with_the_whole_front(board):
    objective = Objective("tasks", GOALS)
    incumbents = Incumbents(board, objective, Racing())
    enter(incumbents, objective, board, 1, right(0.9), right(0.5))
    beside = score(board, 2, right(0.4), right(0.9), n_rounds=6)
    below_second = score(board, 3, right(0.2), right(0.7), n_rounds=6)
    assert incumbents.may_win(beside)
    assert incumbents.may_win(below_second)
    enter(incumbents, objective, board, 2, right(0.4), right(0.9))
    assert not incumbents.may_win(below_second)


def test_blocks_on_which_plans_differ_are_scored_first(board):
    objective = Objective("mean", GOALS)
    incumbents = Incumbents(board, objective, Racing())
    same, last = np.ones(N), np.ones(N)
    last[-8:] = 0.0
    enter(incumbents, objective, board, 1, same, same)
    enter(incumbents, objective, board, 2, last, same)
    first = incumbents.rounds()[0]
    assert ("a", "select", 7) in {block.key for block in first}
    assert sorted(map(id, incumbents.rounds())) == sorted(map(id, board.schedule.rounds["select"]))


def test_a_plan_is_paired_with_the_base_while_there_is_nothing_better(board):
    base = score(board, 0, right(0.5), right(0.5))
    stopped = score(board, 1, right(0.1), right(0.1), n_rounds=4)
    paired = Incumbents(board, Objective("mean", GOALS), Racing(), references={"base": base})
    assert not paired.may_win(stopped)
    assert paired.outcome(stopped).stopped_after == 8
    alone = Incumbents(board, Objective("mean", GOALS), Racing())
    with pytest.raises(StudyError, match="though nothing was scored in full"):
        alone.outcome(stopped)


def test_predicted_scores_of_a_metric_between_0_and_1_lie_there(board):
    """All that was seen is wrong, and by more than the incumbent is right on the rest."""
    objective = Objective("mean", GOALS)
    incumbents = Incumbents(board, objective, Racing())
    enter(incumbents, objective, board, 1, right(0.1), right(0.1))
    enter(incumbents, objective, board, 2, right(0.9, seed=2), right(0.9, seed=2))
    stopped = score(board, 3, right(0.0), right(0.0), n_rounds=3)
    scores = incumbents.outcome(stopped).scores
    assert all(0.0 <= score <= 1.0 for score in scores.values())


def graded(board, number, quality, seed, n_rounds=None):
    """Score a plan whose values are coins and whose grades tell its quality."""
    rng = np.random.default_rng(seed)
    for blocks in board.schedule.rounds["select"][:n_rounds]:
        scores = []
        for block in blocks:
            grades = quality + rng.normal(size=len(block.examples))
            scores.append(
                BlockScores(block, tuple((grades > 0).astype(float)), grades=tuple(grades))
            )
        board.store.put(plan(number), scores)
    return plan(number)


def test_plans_are_compared_by_how_clearly_they_answer_once_that_is_learnt(board):
    objective = Objective("mean", GOALS)
    pool = {f"setting {n}": graded(board, n, 0.15 * n, seed=n) for n in range(8)}
    read = Incumbents(board, objective, Racing(), references=pool, seed=0)
    plain = Incumbents(board, objective, Racing(), references=pool)
    candidate = graded(board, 20, 0.6, seed=20)
    by_metric = board.scores(candidate, "select")
    assert plain.outcome(candidate).estimates == by_metric
    told = read.outcome(candidate)
    assert told.scores == by_metric
    assert told.estimates != by_metric
    assert told.estimates["a"] == pytest.approx(by_metric["a"], abs=0.15)


def test_how_grades_are_read_is_learnt_from_trials_that_were_stopped_too(board):
    objective = Objective("mean", GOALS)
    pool = {f"setting {n}": graded(board, n, 0.15 * n, seed=n) for n in range(8)}
    incumbents = Incumbents(board, objective, Racing(), references=pool, seed=0)
    candidate = graded(board, 20, 0.6, seed=20)
    before = incumbents.outcome(candidate).estimates
    for number in (30, 31):  # learnt at two trials
        stopped = graded(board, number, 0.02 * number, seed=number, n_rounds=4)
        outcome = incumbents.outcome(stopped)
        record = TrialRecord(number, stopped, stopped_after=outcome.stopped_after)
        incumbents.enter(record.judged(objective, outcome.scores, outcome.estimates))
        after = incumbents.outcome(candidate).estimates
        assert (after == before) == (number == 30)

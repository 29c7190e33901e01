"""What candidates are compared with: the best plan so far, or the front."""

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


def graded(board, number, quality, seed):
    """Score a plan whose values are coins and whose grades tell its quality."""
    rng = np.random.default_rng(seed)
    for blocks in board.schedule.rounds["select"]:
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

"""Which plan is saved: by evidence on what was selected on and held out, found or published."""

import numpy as np
import pytest

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.score_kind import Whole
from searchmerge.execution.blocks import Block, BlockScores
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.pick import (
    Contender,
    best_on_select,
    broken,
    confirmed,
    contenders,
    evidence_on_select,
    ranking,
    reference_records,
)
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.search.trials import TrialRecord, best_of
from tests.search.test_trials import plan

GOALS = {"a": Goal(), "b": Goal()}
N = 64
PLANS = {"TIES": plan(1), "average": plan(2), "trial 3": plan(3), "trial 4": plan(4)}
REFERENCES = {name: PLANS[name] for name in ("TIES", "average")}


def blocks(part):
    return {t: tuple(Block(t, part, i, tuple(range(8 * i, 8 * i + 8))) for i in range(8))
            for t in GOALS}  # fmt: skip


@pytest.fixture
def board(tmp_path):
    store = ScoreStore(tmp_path / "scores.db")
    parts = {part: blocks(part) for part in ("select", "hold_out")}
    infos = dict.fromkeys(GOALS, TaskInfo(N))
    yield Scoreboard(Schedule.interleaved(infos, parts, round_blocks=4, seed=0), store)
    store.close()


def put(board, name, part, n_right):
    """Let a plan be right on the first ``n_right`` examples of both tasks."""
    right = (np.arange(N) < n_right).astype(float)
    board.store.put(
        PLANS[name],
        [
            BlockScores(block, tuple(right[list(block.examples)].tolist()))
            for its in blocks(part).values()
            for block in its
        ],
    )


def scored(board, on_select, on_hold_out):
    for name in PLANS:
        put(board, name, "select", on_select[name])
        put(board, name, "hold_out", on_hold_out[name])


OBJECTIVE = Objective("mean", GOALS)


def winner(board, objective=OBJECTIVE):
    before = evidence_on_select(board, PLANS, objective)
    return confirmed(board, before, PLANS, objective).best


def test_a_published_setting_is_saved_where_its_evidence_is_best(board):
    select = {"TIES": 50, "average": 40, "trial 3": 51, "trial 4": 41}
    scored(board, select, {"TIES": 52, "average": 40, "trial 3": 40, "trial 4": 40})
    assert winner(board) == "TIES"


def test_a_found_merge_is_saved_where_its_evidence_is_best(board):
    select = {"TIES": 50, "average": 40, "trial 3": 58, "trial 4": 41}
    scored(board, select, {"TIES": 50, "average": 40, "trial 3": 57, "trial 4": 40})
    assert winner(board) == "trial 3"


def test_a_plan_that_breaks_a_constraint_is_not_saved_where_another_keeps_it(board):
    select = {"TIES": 60, "average": 62, "trial 3": 30, "trial 4": 31}
    scored(board, select, {"TIES": 60, "average": 62, "trial 3": 60, "trial 4": 60})
    limited = Objective("mean", GOALS, constraints=(Constraint("a", "score", 61 / N),))
    assert winner(board, limited) == "average"


def test_plans_that_break_a_constraint_are_ranked_behind_those_that_keep_it(board):
    select = {"TIES": 60, "average": 62, "trial 3": 30, "trial 4": 31}
    scored(board, select, {"TIES": 60, "average": 50, "trial 3": 60, "trial 4": 60})
    limited = Objective("mean", GOALS, constraints=(Constraint("a", "score", 61 / N),))
    before = evidence_on_select(board, PLANS, limited)
    assert ranking(board, before, PLANS, limited) == ["average", "TIES", "trial 4", "trial 3"]
    assert broken(board, PLANS, limited) == dict.fromkeys(
        ("TIES", "trial 3", "trial 4"), (limited.constraints[0].name,)
    )


def test_references_that_merge_rank_among_trials_and_the_models_alone_do_not(board):
    scored(
        board, {"TIES": 50, "average": 40, "trial 3": 51, "trial 4": 41}, dict.fromkeys(PLANS, 1)
    )
    alone = {"base": PLANS["trial 3"], "expert a": PLANS["trial 4"]}  # as well as these are
    records = reference_records(board, {**alone, **REFERENCES}, OBJECTIVE)
    assert {name: record.plan for name, record in records.items()} == REFERENCES
    assert [record.scores for record in records.values()] == [
        board.scores(plan, "select") for plan in REFERENCES.values()
    ]
    trial = TrialRecord(0, PLANS["trial 4"]).judged(OBJECTIVE, board.scores(plan(4), "select"))
    ranked = best_of([trial, *records.values()], 3)
    assert [record.plan for record in ranked] == [PLANS[n] for n in ("TIES", "trial 4", "average")]
    assert len({record.number for record in ranked}) == 3
    assert max(record.number for record in records.values()) < 0


def known(board, objective=OBJECTIVE):
    return {name: Contender.of(board, PLANS[name], objective) for name in PLANS}


def test_by_what_trials_see_the_same_plan_is_best_as_if_nothing_were_told_by_held_out_ones(board):
    select = {"TIES": 58, "average": 40, "trial 3": 51, "trial 4": 41}
    scored(board, select, dict.fromkeys(PLANS, 40))  # all alike
    tasks = board.schedule.tasks
    assert best_on_select(known(board), REFERENCES, tasks, OBJECTIVE) == winner(board) == "TIES"
    limited = Objective("mean", GOALS, constraints=(Constraint("a", "score", 60 / N),))
    best = best_on_select(known(board, limited), REFERENCES, tasks, limited)
    assert best == winner(board, limited)
    assert best_on_select({}, {}, tasks, OBJECTIVE) is None


def test_a_plan_that_keeps_the_constraints_is_best_whatever_its_evidence(board):
    select = {"TIES": 60, "average": 62, "trial 3": 30, "trial 4": 31}
    scored(board, select, select)
    limited = Objective("mean", GOALS, constraints=(Constraint("a", "score", 61 / N),))
    tasks = board.schedule.tasks
    assert best_on_select(known(board, limited), REFERENCES, tasks, limited) == "average"


def test_a_trial_that_is_nearly_a_reference_leaves_it_the_first_place(board):
    scored(
        board, {"TIES": 50, "average": 40, "trial 3": 60, "trial 4": 55}, dict.fromkeys(PLANS, 40)
    )
    tasks = board.schedule.tasks
    assert best_on_select(known(board), REFERENCES, tasks, OBJECTIVE) == "trial 3"
    near = {**REFERENCES, "TIES": plan(3.03)}
    assert best_on_select(known(board), near, tasks, OBJECTIVE) == "trial 4"


def test_a_trial_that_is_a_reference_contends_under_the_name_of_that():
    records = [TrialRecord(3, PLANS["TIES"]), TrialRecord(4, plan(9)), TrialRecord(5, plan(9))]
    references = {"base": plan(0), "TIES": PLANS["TIES"]}
    assert contenders(references, records) == {**references, "trial 4": plan(9)}


def test_where_chance_is_not_known_select_and_held_out_count_alike(board):
    select = {"TIES": 50, "average": 40, "trial 3": 54, "trial 4": 40}
    scored(board, select, {"TIES": 60, "average": 40, "trial 3": 50, "trial 4": 40})
    assert winner(board, Objective("worst", GOALS)) == "TIES"


def test_evidence_of_scores_that_are_no_means_is_their_value(board):
    scored(board, dict.fromkeys(PLANS, 40) | {"trial 4": 44}, dict.fromkeys(PLANS, 40))
    infos = {**board.schedule.tasks, "b": TaskInfo(N, kind=Whole())}
    assert not isinstance(infos["b"].kind, type(board.schedule.tasks["a"].kind))
    told = evidence_on_select(board, PLANS, Objective("worst", GOALS))
    assert told.variances.tolist() == [0.0] * 4
    assert told.best == "trial 4"

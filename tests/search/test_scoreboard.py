"""What plans score, and what of them is still to be scored."""

import numpy as np
import pytest

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.score_kind import OfRecords, Whole
from searchmerge.execution.blocks import BlockScores, make_blocks
from searchmerge.search.grades import Graded, Grader, Reading, Sizes, Step
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.search.unseen import Prior
from tests.search.test_trials import plan

N = 8
TASKS = {
    "mean": TaskInfo(N),
    "records": TaskInfo(N, kind=OfRecords(max)),
    "whole": TaskInfo(N, kind=Whole()),
}
A, B, C = plan(0.1), plan(0.2), plan(0.3)


def value(scored, task, example):
    """Return what a plan scores on an example: A and B differ on 5 and, by less, on 2."""
    if scored == B and example in (2, 5):
        return 0.0 if example == 5 else 0.4
    return 1.0 if task == "mean" else float(example)


@pytest.fixture
def board(tmp_path):
    blocks = {
        "pilot": {t: make_blocks(t, "pilot", range(N), info, 3) for t, info in TASKS.items()}
    }
    store = ScoreStore(tmp_path / "scores.db")
    yield Scoreboard(Schedule.interleaved(TASKS, blocks, round_blocks=2, seed=0), store)
    store.close()


def score(board, scored, rounds):
    """Put down what a worker would give for these rounds."""
    for blocks in rounds:
        board.store.put(
            scored,
            [
                BlockScores(
                    block,
                    (0.7,)
                    if block.task == "whole"
                    else tuple(value(scored, block.task, e) for e in block.examples),
                )
                for block in blocks
            ],
        )


def test_a_plan_is_full_when_no_round_is_missing(board):
    rounds = board.schedule.rounds["pilot"]
    assert not board.is_full(A, "pilot")
    assert board.missing(A, "pilot") == rounds
    score(board, A, rounds[1:])
    assert board.missing(A, "pilot") == rounds[:1]
    score(board, A, rounds[:1])
    assert board.is_full(A, "pilot")
    assert not board.is_full(B, "pilot")


def test_scores_are_made_of_values_as_each_kind_says(board):
    score(board, B, board.schedule.rounds["pilot"])
    values = board.values(B, "pilot")
    assert {task: len(numbers) for task, numbers in values.items()} == {
        "mean": N, "records": N, "whole": 1,
    }  # fmt: skip
    assert board.scores(B, "pilot") == pytest.approx(
        {"mean": (6 + 0.4) / N, "records": 7.0, "whole": 0.7}
    )
    observed = board.observed(B)
    assert observed["records", "pilot", 0] == (7.0,)
    assert observed["mean", "pilot", 1] == (1.0, 1.0, 0.0)


def test_the_examples_on_which_references_differ_come_first(board):
    for scored in (A, B):
        score(board, scored, board.schedule.rounds["pilot"])
    informed = board.informed([A, B], [A, B])
    select = informed.schedule.blocks["select"]
    assert [block.examples for block in select["mean"]] == [(5, 2, 0), (1, 3, 4), (6, 7)]
    # of one number for all examples nothing tells which of them differ
    assert [block.examples for block in select["records"]] == [tuple(range(N))]
    assert [block.examples for block in select["whole"]] == [tuple(range(N))]


def test_what_was_scored_before_is_put_down_for_the_new_blocks(board):
    for scored in (A, B):
        score(board, scored, board.schedule.rounds["pilot"])
    informed = board.informed([A, B], [A, B])
    for scored in (A, B):
        assert informed.is_full(scored, "select")
        assert informed.scores(scored, "select") == pytest.approx(board.scores(scored, "pilot"))
    assert informed.store.get(B)["mean", "select", 0] == (0.0, 0.4, 1.0)
    assert not informed.is_full(C, "select")


def test_the_order_is_that_of_the_deciding_plans_alone(board):
    for scored in (A, B, C):
        score(board, scored, board.schedule.rounds["pilot"])
    blocks = board.informed([A, B, C], [A, C]).schedule.blocks["select"]["mean"]
    assert [block.examples for block in blocks] == [(0, 1, 2), (3, 4, 5), (6, 7)]


def test_blocks_that_come_first_are_read_as_they_are_among_all(tmp_path):
    blocks = {"select": {"mean": make_blocks("mean", "select", range(N), TASKS["mean"], 3)}}
    schedule = Schedule.interleaved({"mean": TASKS["mean"]}, blocks, round_blocks=2, seed=0)
    store = ScoreStore(tmp_path / "scores.db")
    roots = np.sqrt(np.arange(1.0, 9))  # of the grades of the plan that is known
    sizes = Sizes({"mean": roots}, Prior.of({"mean": roots[None] * [[-0.5], [0.5]]}))
    grader = Grader({"mean": Reading((Step(1.0, 1.0, 0.0),), 0.9)}, sizes)
    board = Scoreboard(schedule, store, grader)
    seen = []
    for block in reversed(blocks["select"]["mean"]):  # in another order than they are cut in
        grades = tuple(1.5 * (example + 1) for example in block.examples)
        store.put(A, [BlockScores(block, (1.0,) * len(grades), grades=grades)])
        seen.append(board.seen(A))
        assert board.observed(A) == seen[-1].values
    alone = grader.read("mean", [1.0, 1.0], [10.5, 12.0]).values  # as if they were all
    assert abs(alone[0] - seen[-1].values["mean", "select", 2][0]) > 0.1
    for some in seen:
        for key, values in some.values.items():
            assert values == pytest.approx(seen[-1].values[key], abs=0.02)
    [first] = seen[0].values
    shifts = [max(map(abs, some.shifts[first])) for some in seen[:-1]]
    assert shifts == sorted(shifts, reverse=True)
    assert shifts[-1] > 0
    assert not seen[-1].shifts
    store.close()


def test_an_expert_that_has_no_grades_of_a_task_does_not_tell_how_clearly_others_are_answered(
    tmp_path,
):
    tasks = {"math": TaskInfo(N), "code": TaskInfo(N)}
    blocks = {"select": {t: make_blocks(t, "select", range(N), tasks[t], 3) for t in tasks}}
    store = ScoreStore(tmp_path / "scores.db")
    board = Scoreboard(Schedule.interleaved(tasks, blocks, round_blocks=2, seed=0), store)
    for scored, graded in ((A, tasks), (B, tasks), (C, ("math",))):
        for task, its in blocks["select"].items():
            for block in its:
                values = (1.0,) * len(block.examples)
                grades = values if task in graded else ()
                store.put(scored, [BlockScores(block, values, grades=grades)])
    seen = {task: Graded(range(3), [1.0] * 3) for task in tasks}
    without = board.learn([A], 0, [B])
    assert set(without.units(seen)) == set(tasks)
    assert board.learn([A], 0, [B, C]).units(seen) == without.units(seen)
    store.close()

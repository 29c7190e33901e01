"""What candidates are scored on, and where their observations stand."""

import pytest

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.score_kind import OfRecords, Whole
from searchmerge.execution.blocks import make_blocks
from searchmerge.search.schedule import Schedule

TASKS = {
    "mean": TaskInfo(10),
    "records": TaskInfo(7, kind=OfRecords(max)),
    "whole": TaskInfo(5, kind=Whole()),
}


@pytest.fixture
def schedule():
    blocks = {
        part: {
            task: make_blocks(task, part, range(info.n_examples), info, 4)
            for task, info in TASKS.items()
        }
        for part in ("pilot", "hold_out")
    }
    return Schedule.interleaved(TASKS, blocks, round_blocks=2, seed=3)


def test_observations_of_a_task_stand_one_block_after_the_other(schedule):
    places = schedule.places("pilot")
    assert list(places["mean"].values()) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(places["records"].values()) == list(places["whole"].values()) == [slice(0, 1)]
    assert list(places["mean"]) == [("mean", "pilot", index) for index in range(3)]


def test_examples_of_all_tasks_are_counted(schedule):
    assert schedule.n_examples("pilot") == 10 + 7 + 5


def test_other_blocks_to_select_by_leave_the_other_parts(schedule):
    select = {t: make_blocks(t, "select", range(4), info, 2) for t, info in TASKS.items()}
    informed = schedule.with_select(select)
    assert informed.blocks["select"] == select
    assert informed.rounds["hold_out"] == schedule.rounds["hold_out"]
    assert {len(blocks) for blocks in informed.rounds["select"]} == {2}
    in_rounds = {block for blocks in informed.rounds["select"] for block in blocks}
    assert in_rounds == {block for blocks in select.values() for block in blocks}

"""Every block that was ever scored is kept, whole rounds or none of them."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from searchmerge.errors import StudyError
from searchmerge.evaluators.evaluator import Answer
from searchmerge.execution.blocks import Block, BlockScores
from searchmerge.search.scores import ScoreStore
from tests.search.conftest import toy_schedule
from tests.search.test_trials import plan

FIRST, SECOND, *_ = toy_schedule().rounds["select"]


def scored(blocks, value=0.5):
    return [BlockScores(block, (value,) * len(block.examples)) for block in blocks]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.db"


def test_scores_are_known_to_the_next_run(path):
    store = ScoreStore(path)
    store.put(plan(0), scored(FIRST))
    store.flush()
    store.close()
    again = ScoreStore(path)
    assert set(again.get(plan(0))) == {block.key for block in FIRST}
    assert again.missing(plan(0), (FIRST, SECOND)) == (SECOND,)
    assert again.missing(plan(1), (FIRST, SECOND)) == (FIRST, SECOND)
    again.close()


def test_held_out_blocks_are_scored_again_where_answers_are_wanted_and_not_kept(path):
    store = ScoreStore(path)
    block = Block("math", "hold_out", 0, (5, 3), n_answers=2)
    store.put(plan(0), [BlockScores(block, (0.5, 0.5))])
    assert store.missing(plan(0), ((replace(block, n_answers=0),),)) == ()
    assert store.missing(plan(0), ((block,),)) == ((block,),)
    answers = (Answer(5, {"f1": 0.25}, "what?", "that", ("it", "so"), ("it",)), Answer(3))
    store.put(plan(0), [BlockScores(block, (0.5, 0.5), answers)])
    assert store.missing(plan(0), ((block,),)) == ()
    assert store.answers(plan(0), "math", "hold_out") == answers[::-1]
    assert store.answers(plan(1), "math", "hold_out") == ()
    store.close()


def test_a_round_of_which_a_block_is_missing_is_scored_whole(path):
    store = ScoreStore(path)
    store.put(plan(0), scored(FIRST[:1]))
    assert store.missing(plan(0), (FIRST,)) == (FIRST,)
    store.close()


def test_more_plans_are_known_than_are_kept_in_memory(path):
    store = ScoreStore(path)
    for number in range(300):
        store.put(plan(number), scored(FIRST, number / 300))
    assert store.task_values(plan(0), FIRST[:1]) == (0.0,) * len(FIRST[0].examples)
    assert store.task_values(plan(299), FIRST[:1])[0] == 299 / 300
    store.close()


def test_a_round_that_cannot_be_written_whole_is_not_written_at_all(path):
    store = ScoreStore(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE scores")
        with pytest.raises(StudyError, match=r"scores\.db: scores cannot be written: no such tab"):
            store.put(plan(0), scored(FIRST))
        assert other.execute("SELECT count(*) FROM plans").fetchone() == (0,)
    store.close()

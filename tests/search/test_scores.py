"""Every block that was ever scored is kept, whole rounds or none of them."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from searchmerge.errors import StudyError
from searchmerge.evaluators.evaluator import Answer
from searchmerge.execution.blocks import Block, BlockScores
from searchmerge.plan import MergePlan
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


PLAN = MergePlan("task_arithmetic", ("math",), {"coefficient": ((0.5,),)})
BLOCKS = [Block("math", "select", i, (2 * i, 2 * i + 1)) for i in range(3)]
VALUES = [(0.1, 1 / 3), (1e-300, -7.0), (0.0, 1.0)]


@pytest.fixture
def file(tmp_path):
    store = ScoreStore(tmp_path / "scores.db")
    store.put(PLAN, [BlockScores(b, v) for b, v in zip(BLOCKS, VALUES, strict=True)])
    store.close()
    return tmp_path / "scores.db"


def test_scores_are_read_back_exactly(file):
    store = ScoreStore(file)
    assert store.task_values(PLAN, BLOCKS) == tuple(v for own in VALUES for v in own)
    assert store.missing(PLAN, [tuple(BLOCKS)]) == ()
    store.close()


@pytest.mark.parametrize(
    "damage",
    [
        "vals = '[0.2, 0.3]'",
        "vals = '[0.1'",
        "vals = x'00ff'",
        "task = 'code'",
        "part = 'hold_out'",
        "block = 7",
        "block = 'one'",
        "checksum = ''",
    ],
)
def test_a_damaged_row_is_named_and_never_used(file, damage):
    with sqlite3.connect(file) as connection:
        connection.execute(f"UPDATE scores SET {damage} WHERE block = 1")
    store = ScoreStore(file)
    with pytest.raises(StudyError, match=r"scores\.db: damaged: the scores of block .* of task"):
        store.get(PLAN)
    store.close()


def test_scores_of_one_plan_are_not_taken_for_another_plans(file):
    other = MergePlan("task_arithmetic", ("math",), {"coefficient": ((0.25,),)})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE scores SET digest = ? WHERE block = 1", (other.digest,))
    store = ScoreStore(file)
    assert store.missing(PLAN, [(block,) for block in BLOCKS]) == ((BLOCKS[1],),)
    with pytest.raises(StudyError, match=r"scores\.db: damaged"):
        store.get(other)
    store.close()


@pytest.mark.parametrize(
    "content", [b"text, and no database" * 99, b"SQLite format 3\0" + b"\0" * 4096]
)
def test_a_file_that_is_no_score_cache_is_named(tmp_path, content):
    file = tmp_path / "scores.db"
    file.write_bytes(content)
    with pytest.raises(StudyError, match=r"scores\.db: cannot be used \("):
        ScoreStore(file)


def test_the_cache_of_an_earlier_version_is_named(tmp_path):
    with sqlite3.connect(tmp_path / "scores.db") as connection:
        connection.execute("CREATE TABLE scores (digest, task, part, block, vals)")
    with pytest.raises(StudyError, match=r"scores\.db: cannot be used \(no such column: checksum"):
        ScoreStore(tmp_path / "scores.db")


def test_a_page_that_was_overwritten_is_named(file):
    data = bytearray(file.read_bytes())
    data[4096:] = b"\0" * len(data[4096:])
    file.write_bytes(data)
    store = ScoreStore(file)
    with pytest.raises(StudyError, match=r"scores\.db: cannot be used"):
        store.get(PLAN)
    store.close()


def test_scores_belong_to_the_study_that_they_are_of(path):
    with closing(ScoreStore(path)) as store:
        store.claim("one study")
        store.put(plan(0), scored(FIRST))
    with closing(ScoreStore(path)) as again:
        again.claim("one study")
        with pytest.raises(StudyError, match=r"scores\.db: holds scores of another study"):
            again.claim("another")


def test_scores_that_say_no_study_are_not_taken(path):
    with closing(ScoreStore(path)) as store:
        store.put(plan(0), scored(FIRST))
        with pytest.raises(StudyError, match="holds scores of another study"):
            store.claim("a study")

"""What is kept of each worker of a study."""

from types import SimpleNamespace

import pytest

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Block, BlockScores
from searchmerge.execution.executor import WorkerState
from searchmerge.execution.worker import RoundResult
from searchmerge.search.roster import ROSTER_FILE, Roster, read_roster


def result(n_examples, seconds):
    block = Block("math", "select", 0, tuple(range(n_examples)))
    return RoundResult((BlockScores(block, (0.5,) * n_examples),), seconds / 4, seconds * 3 / 4)


class Pool:
    """Workers as a test says they are."""

    def __init__(self):
        self.states = [
            WorkerState("worker 1", "a", "GPU 0 (H100)", "working", 7),
            WorkerState("worker 2", "b", "cpu", "working", 8),
            WorkerState("worker 3", "", "", "waiting"),
        ]

    def workers(self):
        return self.states


@pytest.fixture
def roster(tmp_path):
    clock = SimpleNamespace(seconds=100.0)
    pool = Pool()
    roster = Roster(pool, tmp_path, lambda: clock.seconds)
    return SimpleNamespace(roster=roster, pool=pool, clock=clock, run_dir=tmp_path)


def rows(kept, *names):
    return [tuple(row[name] for name in names) for row in read_roster(kept.run_dir)[0]]


def test_trials_and_examples_count_for_the_worker_that_was_at_them(roster):
    for job in (7, 8):
        roster.roster.began(job)
    roster.roster.scored(7, result(8, 2.0))
    roster.roster.scored(7, result(4, 1.0))
    roster.roster.scored(8, result(8, 16.0))
    roster.roster.ended(7, is_trial=True)
    roster.roster.ended(8, is_trial=False)
    roster.roster.keep()
    assert rows(roster, "name", "node", "device", "doing") == [
        ("worker 1", "a", "GPU 0 (H100)", "working"),
        ("worker 2", "b", "cpu", "working"),
        ("worker 3", "", "", "waiting"),
    ]
    assert rows(roster, "trials", "examples", "examples_per_s") == [
        (1, 12, 4.0),
        (0, 8, 0.5),
        (0, 0, 0),
    ]


def test_a_worker_that_is_gone_is_not_shown_and_its_number_is_no_others(roster):
    roster.roster.began(7)
    roster.roster.scored(7, result(8, 2.0))
    roster.roster.ended(7, is_trial=False)
    roster.pool.states = [WorkerState("worker 4", "a", "cpu", "working", 9)]
    roster.roster.began(9)
    roster.roster.ended(9, is_trial=True)
    roster.roster.keep()
    assert rows(roster, "name", "trials", "examples") == [("worker 4", 1, 0)]


def test_it_is_written_every_few_seconds_or_at_once(roster):
    def is_written():
        file = roster.run_dir / ROSTER_FILE
        written = file.exists()
        file.unlink(missing_ok=True)
        return written

    roster.roster.keep()
    assert is_written()
    roster.clock.seconds += 4.0
    roster.roster.keep()
    assert not is_written()
    roster.roster.keep(at_once=True)
    assert is_written()
    roster.clock.seconds += 5.0
    roster.roster.keep()
    assert is_written()


def test_without_a_run_directory_nothing_is_kept(roster):
    Roster(roster.pool, None).keep()
    assert read_roster(roster.run_dir) == ([], None)


def test_what_cannot_be_written_or_read_is_named(roster):
    with pytest.raises(
        StudyError, match=r"nowhere/workers\.json: cannot be written: No such file"
    ):
        Roster(roster.pool, roster.run_dir / "nowhere").keep()
    (roster.run_dir / ROSTER_FILE).write_text("{}")
    with pytest.raises(StudyError, match=r"workers\.json: damaged: it is not as it was written"):
        read_roster(roster.run_dir)

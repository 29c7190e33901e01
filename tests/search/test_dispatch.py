"""Jobs on an executor whose workers are lost as a script says."""

import pytest

from searchmerge.execution.blocks import BlockScores
from searchmerge.execution.executor import Finished, Lost, Scored
from searchmerge.execution.worker import RoundResult
from searchmerge.plan import MergePlan
from searchmerge.search.dispatch import MAX_SPARED, MAX_TRIES, Dispatcher, Job, ListSource
from searchmerge.search.scores import ScoreStore
from tests.search.conftest import toy_schedule
from tests.toy import EXPERTS

ROUNDS = toy_schedule().rounds["select"]


def plan(first):
    return MergePlan("task_arithmetic", EXPERTS, {"coefficient": ((first, 0.2, 0.1),)})


class Scripted:
    """Scores as many rounds of each try as the script says, and then loses the worker.

    Args:
        script: For each try, rounds scored before the loss, and whether the job is blameless;
            ``None`` rounds where it was not even begun.
    """

    def __init__(self, script):
        self.script = list(script)
        self.n_free = 1
        self.tries = []
        self._events = []

    def submit(self, job, plan, rounds):
        self.n_free = 0
        self.tries.append(len(rounds))
        n_rounds, blameless = self.script.pop(0) if self.script else (len(rounds), None)
        self._events = [
            Scored(job, RoundResult(tuple(BlockScores(b, (0.5,) * 4) for b in r), 0.0, 1.0))
            for r in rounds[: n_rounds or 0]
        ]
        lost = Lost(job, "its worker was lost", bool(blameless), n_rounds is not None)
        self._events.append(Finished(job) if blameless is None else lost)

    def stop(self, job):
        raise AssertionError("nothing is to be stopped")

    def next_event(self, timeout_s):
        event = self._events.pop(0)
        self.n_free = int(not self._events)
        return event


@pytest.fixture
def dispatch(tmp_path):
    store = ScoreStore(tmp_path / "scores.db")

    def dispatch(*script, n_jobs=1):
        executor = Scripted(script)
        source = ListSource([Job(f"job {i}", plan(i), ROUNDS, None) for i in range(n_jobs)])
        Dispatcher(executor, store).run(source)
        return executor, source

    yield dispatch
    store.close()


def test_a_lost_job_goes_on_with_the_rounds_it_has_block_by_block(dispatch):
    executor, source = dispatch((2, False))
    assert executor.tries == [5, 9]  # three rounds of three blocks
    assert [job.name for job in source.done] == ["job 0"]
    assert source.done[0].score_s == 11.0


def test_two_deaths_without_a_block_in_between_end_a_plan(dispatch):
    executor, source = dispatch((2, False), (0, False), n_jobs=2)
    assert executor.tries == [5, 9, 5]
    assert source.failures == {"job 0": "its worker was lost (2 tries)"}
    assert [job.name for job in source.done] == ["job 1"]


def test_a_job_that_comes_a_block_further_each_time_is_done_in_the_end(dispatch):
    executor, source = dispatch(*[(1, False)] * 5)
    assert executor.tries == [5, 12, 11, 10, 9, 8]
    assert [job.name for job in source.done] == ["job 0"]


def test_losses_that_are_nobodys_fault_count_as_tries_alone(dispatch):
    executor, source = dispatch((0, True), (0, True))
    assert executor.tries == [5, 15, 15]
    assert [job.name for job in source.done] == ["job 0"]
    _, source = dispatch((0, True), (0, False), (0, True), n_jobs=2)
    assert source.failures == {"job 1": "its worker was lost (3 tries)"}


def test_workers_that_were_dead_before_they_took_a_job_up_are_no_tries(dispatch):
    executor, source = dispatch(*[(None, True)] * 4, (0, False))
    assert executor.tries == [*[5] * 5, 15]
    assert [job.tries for job in source.done] == [1]


def test_a_job_that_no_worker_ever_takes_up_ends(dispatch):
    executor, source = dispatch(*[(None, True)] * 99)
    assert len(executor.tries) == MAX_SPARED + MAX_TRIES
    assert source.failures == {"job 0": "its worker was lost (3 tries)"}

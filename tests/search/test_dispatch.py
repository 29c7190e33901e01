"""Jobs on an executor whose workers are lost as a script says."""

import pytest

from searchmerge.execution.blocks import BlockScores
from searchmerge.execution.executor import Finished, Lost, Scored, WorkerState
from searchmerge.execution.worker import RoundResult
from searchmerge.plan import MergePlan
from searchmerge.search.crashes import MAX_DEATHS, MAX_SPARED
from searchmerge.search.dispatch import Dispatcher, Job, ListSource
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
        self._job = None

    def workers(self):
        return [WorkerState("worker 1", "a", "cpu", "working", self._job)]

    def submit(self, job, plan, rounds):
        self.n_free, self._job = 0, job
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

    def dispatch(*script, n_jobs=1, n_plans=None):
        executor = Scripted(script)
        plans = [plan(i % (n_plans or n_jobs)) for i in range(n_jobs)]
        source = ListSource([Job(f"job {i}", its, ROUNDS, None) for i, its in enumerate(plans)])
        Dispatcher(executor, store).run(source)
        return executor, source

    yield dispatch
    store.close()


def test_a_lost_job_goes_on_with_the_rounds_it_has_block_by_block(dispatch):
    executor, source = dispatch((2, False))
    assert executor.tries == [5, 9]  # three rounds of three blocks
    assert [job.name for job in source.done] == ["job 0"]
    assert source.done[0].score_s == 11.0


def test_three_deaths_without_a_block_in_between_end_a_plan(dispatch):
    executor, source = dispatch((2, False), (0, False), (0, False), n_jobs=2)
    assert executor.tries == [5, 9, 9, 5]
    assert source.failures == {"job 0": "its worker was lost (3 workers in a row)"}
    assert [job.name for job in source.done] == ["job 1"]


def test_two_deaths_end_a_plan_once_many_others_went_well(dispatch):
    _, source = dispatch(*[(15, None)] * 100, (0, False), (0, False), n_jobs=102)
    assert source.failures == {"job 100": "its worker was lost (2 workers in a row)"}
    assert len(source.done) == 101


def test_a_job_that_comes_a_block_further_each_time_is_done_in_the_end(dispatch):
    executor, source = dispatch(*[(1, False)] * 5)
    assert executor.tries == [5, 12, 11, 10, 9, 8]
    assert [job.name for job in source.done] == ["job 0"]


UNLUCKY = [(0, False)] * 4 + [(15, None)]


def test_a_good_plan_is_not_given_up_for_the_bad_luck_that_others_have_too(dispatch):
    seen = [(0, False), (15, None), (1, False), (15, None)] * 15
    _, source = dispatch(*seen, *UNLUCKY, n_jobs=31)
    assert source.failures == {}


def test_where_nothing_else_dies_as_many_deaths_are_the_plans_doing(dispatch):
    _, source = dispatch(*[(15, None)] * 60, *UNLUCKY, n_jobs=61)
    assert source.failures == {"job 60": "its worker was lost (3 workers in a row)"}


def test_a_plan_that_kills_every_worker_ends_however_many_others_die_too(dispatch):
    seen = [(0, False), (0, False), (15, None)] * 20
    executor, source = dispatch(*seen, *[(0, False)] * 99, n_jobs=21)
    assert source.failures == {"job 20": f"its worker was lost ({MAX_DEATHS} workers in a row)"}
    assert len(executor.tries) == 60 + MAX_DEATHS


def test_nodes_that_go_away_are_no_tries(dispatch):
    executor, source = dispatch(*[(0, True)] * MAX_SPARED, (0, False), (0, False))
    assert executor.tries == [5, *[15] * (MAX_SPARED + 2)]
    assert [job.name for job in source.done] == ["job 0"]


def test_workers_that_were_dead_before_they_took_a_job_up_are_no_tries(dispatch):
    executor, source = dispatch(*[(None, True)] * 4, (0, False))
    assert executor.tries == [*[5] * 5, 15]
    assert [job.name for job in source.done] == ["job 0"]


def test_a_block_that_is_scored_begins_the_count_anew(dispatch):
    _, source = dispatch(*([(0, True)] * (MAX_SPARED - 1) + [(1, True)]) * 3)
    assert source.failures == {}


def test_a_job_that_takes_every_node_with_it_ends(dispatch):
    executor, source = dispatch(*[(None, True)] * 99)
    assert len(executor.tries) == MAX_SPARED + 1
    assert source.failures == {"job 0": "its worker was lost (11 workers in a row)"}


@pytest.mark.parametrize(("loss", "n"), [((None, True), MAX_SPARED + 1), ((0, False), 3)])
def test_a_plan_that_was_given_up_is_not_tried_again_and_says_why(dispatch, loss, n):
    executor, source = dispatch(*[loss] * n, n_jobs=2, n_plans=1)
    assert len(executor.tries) == n
    assert source.failures["job 1"] == f"{n} workers in a row were lost at this plan"

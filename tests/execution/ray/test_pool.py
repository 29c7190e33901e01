"""Ray workers that die, hang, break or come and go."""

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from searchmerge.errors import EvaluationError, SpecError, StudyError, WorkerError
from searchmerge.execution.executor import Finished, Lost, Scored, WorkerState
from searchmerge.interrupts import stopped_by_signals
from searchmerge.search.dispatch import Dispatcher, Job, ListSource
from tests.execution import workers
from tests.execution.conftest import STORE_BYTES
from tests.execution.test_executor import until_it_ends
from tests.execution.workers import (
    BREAKS,
    DEVICE_FAULT,
    DIES,
    FAILS,
    FINE,
    HANGS,
    ROUNDS,
    STOPS,
    plan,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
HOST = socket.gethostname()


def jobs(*kinds):
    return ListSource(
        [Job(f"job {i}", plan(kind, i / 100), ROUNDS, None) for i, kind in enumerate(kinds)]
    )


def expected(job):
    return [
        (scores.block.key, scores.values)
        for result in workers.make().score(job.plan, ROUNDS)
        for scores in result.scores
    ]


def test_two_workers_score_what_one_in_process_does_and_each_block_once(pool, store):
    source = jobs(*[FINE] * 12)
    Dispatcher(pool(), store).run(source)
    assert len(source.done) == 12
    for job in source.done:
        assert sorted(store.get(job.plan).items()) == sorted(expected(job))


def test_a_worker_that_is_killed_in_a_block_is_replaced_and_its_job_goes_on(pool, store, notes):
    executor = pool(functools.partial(workers.make, notes, 0.05), workers=1)
    job = Job("job", plan(FINE), ROUNDS, None)
    executor.tasks()
    executor.submit(1, job.plan, ROUNDS)
    first = executor.next_event(30.0)
    assert isinstance(first, Scored)
    [pid] = workers.busy(notes)
    os.kill(pid, signal.SIGKILL)
    *_, lost = until_it_ends(executor, 1)
    assert isinstance(lost, Lost)
    assert not lost.blameless
    assert "worker process has died" in lost.reason
    assert executor.n_free == 0
    source = ListSource([job])
    store.put(job.plan, first.result.scores)
    Dispatcher(executor, store).run(source)
    assert source.done == [job]
    assert sorted(store.get(job.plan).items()) == sorted(expected(job))
    assert set(workers.busy(notes)) != {pid}


def test_the_first_worker_measures_and_all_score_so(pool, notes):
    executor = pool(functools.partial(workers.make_tuned, notes), workers=2)
    assert executor.tune(ROUNDS[0]) == {"math": {"growth": 2}}
    executor.use({"math": {"growth": 4}})
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)
    for job in (1, 2):
        executor.submit(job, plan(FINE, job / 10), ROUNDS)
    ended = 0
    while ended < 2:
        ended += isinstance(executor.next_event(30.0), Finished)
    used = [file.read_text() for file in notes.glob("used-*")]
    assert used == ["{'growth': 4}"] * 2


def test_a_worker_that_dies_as_it_measures_costs_no_more_than_itself(pool, notes, caplog):
    executor = pool(functools.partial(workers.make_tuned, notes, DIES), workers=1)
    assert executor.tune(ROUNDS[0]) == {}
    assert f"worker 1 on {HOST} could not measure how scoring is fastest" in caplog.text
    executor.use({})
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free)
    executor.submit(1, plan(FINE), ROUNDS)
    assert until_it_ends(executor, 1)[-1] == Finished(1)


@pytest.mark.slow
def test_a_worker_that_hangs_as_it_measures_is_killed_and_replaced(pool, notes, caplog):
    executor = pool(functools.partial(workers.make_tuned, notes, HANGS), workers=1, deadline_s=2.0)
    assert executor.tune(ROUNDS[0]) == {}
    told = f"worker 1 on {HOST} could not measure how scoring is fastest; the usual way is taken: "
    assert f"{told}no round within its deadline (2 s)" in caplog.text
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free)
    assert [worker.name for worker in executor.workers()] == ["worker 2"]


def test_a_plan_that_kills_three_workers_is_not_tried_again_and_the_others_go_on(pool, store):
    source = jobs(FINE, DIES, FINE, FINE)
    Dispatcher(pool(), store).run(source)
    assert {job.name for job in source.done} == {"job 0", "job 2", "job 3"}
    assert list(source.failures) == ["job 1"]
    assert "worker process has died" in source.failures["job 1"]
    assert source.failures["job 1"].endswith("(3 workers in a row)")


@pytest.mark.slow
def test_a_device_fault_ends_its_worker_and_is_the_reason(pool, store):
    source = jobs(DEVICE_FAULT, FINE)
    Dispatcher(pool(workers=1), store).run(source)
    assert [job.name for job in source.done] == ["job 1"]
    assert "CUDA error: an illegal memory access" in source.failures["job 0"]
    assert source.failures["job 0"].endswith("(3 workers in a row)")


@pytest.mark.parametrize(
    "kind",
    [HANGS, pytest.param(STOPS, marks=pytest.mark.slow)],
    ids=["it sleeps", "it is stopped by a signal"],
)
def test_a_worker_that_hangs_past_its_deadline_is_killed(pool, notes, kind):
    executor = pool(functools.partial(workers.make, notes), workers=1, deadline_s=1.0)
    executor.tasks()
    executor.submit(1, plan(kind), ROUNDS)
    wait_for(lambda: workers.busy(notes))
    [pid] = workers.busy(notes)
    *_, lost = until_it_ends(executor, 1)
    assert lost.reason == f"worker 1 on {HOST}: no round within its deadline (1 s)"
    assert not lost.blameless
    wait_for(lambda: pid not in workers.busy(notes))
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free)
    executor.submit(2, plan(FINE), ROUNDS)
    assert until_it_ends(executor, 2)[-1] == Finished(2)


def test_a_worker_that_dies_idle_is_not_the_next_plans_fault(pool, notes):
    executor = pool(functools.partial(workers.make, notes), workers=1)
    executor.tasks()
    executor.submit(1, plan(FINE), ROUNDS)
    until_it_ends(executor, 1)
    [pid] = workers.busy(notes)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not workers.busy(notes))
    executor.submit(2, plan(FINE), ROUNDS)
    *_, lost = until_it_ends(executor, 2)
    assert isinstance(lost, Lost)
    assert lost.blameless


def test_a_worker_that_hangs_is_killed_however_busy_the_others_are(pool, notes):
    executor = pool(functools.partial(workers.make, notes, 0.02), workers=2, deadline_s=1.0)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)
    executor.submit(0, plan(HANGS), ROUNDS)
    [hanging] = [worker.name for worker in executor.workers() if worker.job == 0]
    events, give_up = [], time.monotonic() + 30
    for number in itertools.count(1):
        executor.submit(number, plan(FINE), ROUNDS)
        events += until_it_ends(executor, number)
        if Lost in map(type, events):
            break
        assert time.monotonic() < give_up, "it was not killed"
    assert Lost(0, f"{hanging} on {HOST}: no round within its deadline (1 s)") in events


def test_a_job_behind_one_that_was_stopped_and_hangs_is_not_to_blame(pool, notes):
    executor = pool(functools.partial(workers.make, notes), workers=1, deadline_s=1.0)
    executor.tasks()
    executor.submit(1, plan(HANGS), ROUNDS)
    wait_for(lambda: (notes / f"hangs-{next(iter(workers.busy(notes)), 0)}").exists())
    assert isinstance(executor.next_event(30.0), Scored)
    executor.stop(1)
    executor.submit(2, plan(FINE), ROUNDS)
    [lost] = until_it_ends(executor, 2)
    reason = f"worker 1 on {HOST}: no round within its deadline (1 s)"
    assert lost == Lost(2, reason, blameless=True, was_begun=False)


@pytest.mark.slow
def test_a_job_outlives_more_dead_idle_workers_than_may_die_at_it(pool, store, notes):
    executor = pool(functools.partial(workers.make, notes), workers=4)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 4)
    for number in range(4):
        executor.submit(number, plan(FINE, number / 100), ROUNDS)
    ended = 0
    while ended < 4:
        ended += isinstance(executor.next_event(30.0), Finished)
    for pid in workers.busy(notes):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not workers.busy(notes))
    source = jobs(FINE)
    Dispatcher(executor, store).run(source)
    assert [job.name for job in source.done] == ["job 0"]


def test_a_worker_that_finds_a_broken_device_is_replaced(pool, notes):
    executor = pool(functools.partial(workers.make_faulty, notes, 1), workers=1)
    assert executor.tasks()
    assert executor.n_free == 1


@pytest.mark.slow
def test_devices_that_are_all_broken_stop_the_study(pool, notes):
    executor = pool(functools.partial(workers.make_faulty, notes, 99), workers=1)
    with pytest.raises(
        StudyError, match=r"3 workers died as they loaded; the last: worker 3 on .*ECC"
    ):
        executor.tasks()


def test_a_worker_that_cannot_be_loaded_stops_the_study_with_its_own_traceback(pool):
    executor = pool(functools.partial(workers.make_broken, KeyError("no such layer")))
    with pytest.raises(StudyError, match=r"(?s)cannot be loaded.*in make_broken.*no such layer"):
        executor.tasks()


def test_a_wrong_input_that_only_a_worker_sees_is_told_in_its_own_words(pool):
    executor = pool(functools.partial(workers.make_broken, SpecError("tasks.x: no such split")))
    with pytest.raises(SpecError, match=r"^tasks\.x: no such split$"):
        executor.tasks()


def test_a_node_that_lacks_a_file_is_named_and_does_not_stop_a_study_that_runs(
    pool, notes, caplog
):
    executor = pool(functools.partial(workers.make_missing, notes), workers=1)
    executor.tasks()
    executor.submit(1, plan(DIES), ROUNDS)
    assert isinstance(until_it_ends(executor, 1)[-1], Lost)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free)
    told = f"worker 2 on {HOST} was lost as it loaded: it cannot be loaded there: "
    assert f"{told}{notes}/base: no such directory" in caplog.text
    assert [worker.name for worker in executor.workers()] == ["worker 3"]


def test_workers_that_die_as_they_load_are_replaced(pool, notes):
    executor = pool(functools.partial(workers.make_dying, notes, 1), workers=1)
    assert executor.tasks()
    assert executor.n_free == 1


def test_workers_that_always_die_as_they_load_stop_the_study(pool, notes):
    executor = pool(functools.partial(workers.make_dying, notes, 99), workers=1)
    told = r"3 workers died as they loaded; the last: worker 3 on \S+: the worker died"
    with pytest.raises(StudyError, match=told):
        executor.tasks()


def test_a_worker_that_hangs_as_it_loads_is_named_and_replaced(pool, notes, caplog):
    executor = pool(functools.partial(workers.make_slow, notes, 1), workers=1, loading_s=5.0)
    assert executor.tasks()
    assert f"worker 1 on {HOST} was lost as it loaded: not loaded within 5 s" in caplog.text
    [worker] = executor.workers()
    assert worker == WorkerState("worker 2", HOST, "cpu", "idle")


@pytest.mark.slow
def test_a_worker_that_hangs_before_it_says_where_it_is_is_asked_for_anew(pool, notes, caplog):
    executor = pool(workers.HangsAsItArrives(notes, 1), workers=1, loading_s=5.0)
    assert executor.tasks()
    told = "worker 1 has not begun to load within 5 s; ray.loading_deadline of the config"
    assert f"{told}: another is asked for in its place" in caplog.text
    [worker] = executor.workers()
    assert worker == WorkerState("worker 2", HOST, "cpu", "idle")


def merged(executor):
    """Return the tensors of the worker that merged to the end, and how often one began."""
    tries = []

    def write(weights):
        tries.append({})
        for name, tensor in weights:
            tries[-1][name] = tensor.tolist()

    executor.write_merged(plan(FINE), torch.float32, write)
    return tries[-1], len(tries)


def of_worker(number):
    return {"large": [number] * 2, "small": [number] * 3}


@pytest.mark.parametrize(
    ("n_workers", "kind"), [(1, DIES), pytest.param(1, BREAKS, marks=pytest.mark.slow), (2, DIES)]
)
def test_a_worker_that_fails_as_it_merges_has_another_begin_anew(
    pool, notes, caplog, kind, n_workers
):
    executor = pool(functools.partial(workers.make_numbered, notes, kind, 1), workers=n_workers)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == n_workers)
    assert merged(executor) == (of_worker(1), 2)
    assert f"worker 1 on {HOST} did not merge the model: a worker " in caplog.text
    assert "worker 1" not in [worker.name for worker in executor.workers()]


def test_workers_that_die_idle_leave_the_merge_to_others(pool, notes):
    executor = pool(functools.partial(workers.make_numbered, notes), workers=2)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)
    for file in notes.glob("loads-*"):
        os.kill(int(file.name.removeprefix("loads-")), signal.SIGKILL)
    assert merged(executor) == (of_worker(0), 3)


def test_a_merge_waits_for_a_worker_that_loads(pool, notes):
    executor = pool(functools.partial(workers.make_numbered, notes), workers=1)
    assert executor.n_free == 0
    assert merged(executor) == (of_worker(0), 1)


def test_a_merge_that_no_worker_gets_done_is_given_up(pool, notes):
    executor = pool(functools.partial(workers.make_numbered, notes, DIES, 99), workers=1)
    with pytest.raises(WorkerError, match="3 workers in a row did not merge it"):
        merged(executor)
    assert len(list(notes.glob("merges-*"))) == 3


def test_a_merge_that_would_end_the_same_way_is_not_asked_of_another(pool, notes):
    executor = pool(functools.partial(workers.make_numbered, notes, FAILS, 99), workers=2)
    with pytest.raises(EvaluationError, match="'small' is not finite"):
        merged(executor)
    assert len(list(notes.glob("merges-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "loading_s", "message"),
    [
        (workers.make_slow, 2.0, "no worker was free within 2 s"),
        (workers.make_dying, 60.0, "3 workers died as they loaded"),
    ],
    ids=["hang", "die"],
)
def test_where_no_worker_loads_there_is_none_to_merge(pool, notes, make, loading_s, message):
    executor = pool(functools.partial(make, notes, 99), workers=1, loading_s=loading_s)
    with pytest.raises(WorkerError, match=message):
        merged(executor)


def test_a_merge_is_stopped_at_once_while_its_worker_hangs(pool, notes):
    executor = pool(functools.partial(workers.make_numbered, notes, HANGS, 1), workers=1)
    stop = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])

    def write(weights):
        assert next(weights)[0] == "large"
        stop.start()
        next(weights)

    # as in a run: whoever started the tests in the background may have had the signal ignored
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        executor.write_merged(plan(FINE), torch.float32, write)
    stop.join()


def test_it_tells_what_each_worker_is_at(pool, notes):
    executor = pool(functools.partial(workers.make, notes), workers=3, cpus=2.0, address="auto")
    assert {(worker.doing, worker.device) for worker in executor.workers()} == {("waiting", "")}
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)
    executor.submit(5, plan(HANGS), ROUNDS)
    told = [
        (worker.node, worker.device, worker.doing, worker.job) for worker in executor.workers()
    ]
    assert told.count((HOST, "cpu", "idle", None)) == 1
    assert told.count((HOST, "cpu", "working", 5)) == 1
    assert told.count(("", "", "waiting", None)) == 1
    assert len({worker.name for worker in executor.workers()}) == 3


def test_more_workers_than_there_is_room_for_are_refused_with_what_there_is(pool):
    with pytest.raises(StudyError, match=r"9 workers of 1 CPUs each .* has 4 CPUs, room for 4"):
        pool(workers=9, cpus=1.0)
    with pytest.raises(StudyError, match=r"2 workers of 1 CPUs and 0.5 GPUs each .* room for 0"):
        pool(workers=2, cpus=1.0, gpus=0.5)


def test_without_a_number_there_are_as_many_workers_as_fit(pool):
    executor = pool(workers=None, cpus=2.0)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)


class TakesAway(ListSource):
    """Jobs at the first round of which a node is taken away."""

    def __init__(self, jobs, cluster, node):
        super().__init__(jobs)
        self._cluster, self._node = cluster, node

    def goes_on(self, job):
        if self._node is not None:
            self._cluster.remove_node(self._node, allow_graceful=False)
            self._node = None
        return True


def test_workers_join_and_leave_with_their_nodes(pool, cluster, store, notes):
    executor = pool(
        functools.partial(workers.make, notes, 0.05), address="auto", workers=3, cpus=2.0
    )
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 2)
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    wait_for(lambda: executor.next_event(0.1) is None and executor.n_free == 3)
    source = TakesAway(jobs(*[FINE] * 9).jobs, cluster, node)
    Dispatcher(executor, store).run(source)
    assert {job.name for job in source.done} == {f"job {i}" for i in range(9)}
    for job in source.done:
        assert sorted(store.get(job.plan).items()) == sorted(expected(job))


def test_a_job_whose_node_is_taken_away_is_not_to_blame(pool, cluster, notes):
    node = cluster.add_node(num_cpus=8, object_store_memory=STORE_BYTES)
    executor = pool(functools.partial(workers.make, notes, 0.2), workers=1, cpus=8.0)
    executor.tasks()
    executor.submit(1, plan(FINE), ROUNDS)
    wait_for(lambda: workers.busy(notes))
    cluster.remove_node(node, allow_graceful=False)
    *_, lost = until_it_ends(executor, 1)
    assert lost.reason.endswith(("its node was taken away", "its node cannot be reached"))
    assert lost.blameless


def test_a_study_stops_where_ray_itself_dies_on_this_machine():
    code = (
        "import functools, os, signal, subprocess\n"
        "from searchmerge.execution.ray.pool import RayExecutor, RaySettings\n"
        "from tests.execution import workers\n"
        "executor = RayExecutor(workers.make, RaySettings(workers=1, cpus=0.5))\n"
        "executor.tasks()\n"
        "found = subprocess.run(['pgrep', '-x', '-P', str(os.getpid()), 'raylet'],"
        " capture_output=True, text=True, check=True)\n"
        "executor.submit(1, workers.plan(workers.HANGS), workers.ROUNDS)\n"
        "os.kill(int(found.stdout), signal.SIGKILL)\n"
        "try:\n"
        "    while True: executor.next_event(5.0)\n"
        "finally:\n"
        "    executor.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == ""
    assert done.stderr.startswith("Traceback")  # of Ray itself nothing is heard
    assert "StudyError: Ray died on this machine" in done.stderr


def test_an_address_where_nothing_listens_is_refused_at_once():
    code = (
        "from searchmerge.execution.ray.pool import RayExecutor, RaySettings\n"
        "RayExecutor(print, RaySettings(address='localhost:1'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StudyError: ray.address localhost:1: no cluster answers there" in done.stderr

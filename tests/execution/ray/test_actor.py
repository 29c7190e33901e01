"""What the actor of one worker says, called here and without Ray's processes."""

import functools
import os
import socket

import pytest

from searchmerge.errors import DeviceFault
from searchmerge.execution.ray.actor import Begun, Loaded, Placed, RayWorker
from searchmerge.execution.worker import RoundResult
from tests.execution import workers
from tests.execution.workers import DEVICE_FAULT, FINE, ROUNDS, plan
from tests.toy import EXPERTS

pytestmark = pytest.mark.ray


@pytest.fixture
def actor(cluster):
    actor = RayWorker({})
    assert list(actor.load(workers.make))
    return actor


def test_it_passes_the_drivers_environment_on(monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_TEST_SWITCH", "before")
    RayWorker({"SEARCHMERGE_TEST_SWITCH": "after"})
    assert os.environ["SEARCHMERGE_TEST_SWITCH"] == "after"


def test_it_says_where_it_is_and_once_loaded_its_tasks_and_its_device(cluster):
    placed, loaded = RayWorker({}).load(workers.make)
    assert placed.host == socket.gethostname()
    assert len(placed.node) == 56
    assert int(placed.node, 16)
    assert isinstance(loaded, Loaded)
    assert loaded.device == "cpu"
    assert {name: info.n_examples for name, info in loaded.tasks.items()} == dict.fromkeys(
        EXPERTS, 40
    )


def test_it_says_where_it_is_before_it_loads(cluster):
    loading = RayWorker({}).load(functools.partial(workers.make_broken, KeyError("no layer")))
    assert isinstance(next(loading), Placed)
    with pytest.raises(KeyError, match="no layer"):
        next(loading)


def test_a_job_begins_and_gives_the_workers_rounds(actor):
    first, *rounds = actor.score(plan(FINE), ROUNDS, {})
    assert first == Begun()
    expected = [result.scores for result in workers.make().score(plan(FINE), ROUNDS)]
    assert [result.scores for result in rounds] == expected


def test_a_device_fault_is_the_last_thing_it_says(actor):
    begun, scored, fault = actor.score(plan(DEVICE_FAULT), ROUNDS, {})
    assert begun == Begun()
    assert isinstance(scored, RoundResult)
    assert isinstance(fault, DeviceFault)


def test_a_job_without_a_model_is_a_mistake():
    with pytest.raises(RuntimeError, match="a worker that has loaded no model"):
        next(RayWorker({}).score(plan(FINE), ROUNDS, {}))

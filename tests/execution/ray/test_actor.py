"""What the actor of one worker says, called here and without Ray's processes."""

import os

import pytest

from searchmerge.errors import DeviceFault
from searchmerge.execution.ray.actor import Begun, Loaded, RayWorker
from searchmerge.execution.worker import RoundResult
from tests.execution import workers
from tests.execution.workers import DEVICE_FAULT, FINE, ROUNDS, plan
from tests.toy import EXPERTS

pytestmark = pytest.mark.ray


@pytest.fixture
def actor(cluster):
    actor = RayWorker({})
    actor.load(workers.make)
    return actor


def test_it_passes_the_drivers_environment_on(monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_TEST_SWITCH", "before")
    RayWorker({"SEARCHMERGE_TEST_SWITCH": "after"})
    assert os.environ["SEARCHMERGE_TEST_SWITCH"] == "after"


def test_once_loaded_it_tells_its_tasks_and_its_node(cluster):
    loaded = RayWorker({}).load(workers.make)
    assert isinstance(loaded, Loaded)
    assert {name: info.n_examples for name, info in loaded.tasks.items()} == dict.fromkeys(
        EXPERTS, 40
    )
    assert len(loaded.node) == 56
    assert int(loaded.node, 16)


def test_a_job_begins_and_gives_the_workers_rounds(actor):
    first, *rounds = actor.score(plan(FINE), ROUNDS)
    assert first == Begun()
    expected = [result.scores for result in workers.make().score(plan(FINE), ROUNDS)]
    assert [result.scores for result in rounds] == expected


def test_a_device_fault_is_the_last_thing_it_says(actor):
    begun, scored, fault = actor.score(plan(DEVICE_FAULT), ROUNDS)
    assert begun == Begun()
    assert isinstance(scored, RoundResult)
    assert isinstance(fault, DeviceFault)


def test_a_job_without_a_model_is_a_mistake():
    with pytest.raises(RuntimeError, match="a worker that has loaded no model"):
        next(RayWorker({}).score(plan(FINE), ROUNDS))

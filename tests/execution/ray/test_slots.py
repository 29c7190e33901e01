"""Actors are asked for, heard of one after the other, and killed."""

import functools
import socket

import pytest

from searchmerge.execution.ray.actor import Loaded, Placed
from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.ray.slots import Slot, Slots
from tests.execution import workers
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("state", "doing", "at"),
    [
        ({"call": "loading"}, "waiting", "worker 7"),
        ({"call": "loading", "node": "a", "host": "here"}, "loading", "worker 7 on here"),
        ({"node": "a", "host": "here", "device": "cpu"}, "idle", "worker 7 on here"),
        (
            {"call": "job", "node": "a", "host": "here", "device": "cpu", "job": 3},
            "working",
            "worker 7 on here",
        ),
    ],
)
def test_a_slot_says_what_it_is_at_and_where(state, doing, at):
    slot = Slot(7, None, **{"call": None, "since": 0.0, **state})
    assert (slot.doing, slot.at, slot.is_free) == (doing, at, "call" not in state)


@pytest.fixture
def slots(cluster, notes):
    slots = Slots(functools.partial(workers.make, notes), RaySettings(cpus=0.5))
    yield slots
    slots.drop_all()


def said(slots):
    """Return the next slot that has something to say, and that."""
    import ray

    slot = wait_for(lambda: slots.next_ready(1.0))
    return slot, ray.get(next(slot.call))


def test_an_actor_that_is_asked_for_says_where_it_is_and_then_what_it_has_loaded(slots):
    assert slots.next_ready(0.0) is None
    slots.ask(())
    [slot] = slots
    assert (slot.name, slot.doing) == ("worker 1", "waiting")
    first, placed = said(slots)
    assert first is slot
    assert isinstance(placed, Placed)
    assert placed.host == socket.gethostname()
    second, loaded = said(slots)
    assert second is slot
    assert isinstance(loaded, Loaded)


def test_no_slot_is_served_twice_before_another_that_is_ready_is_served_once(slots):
    import ray

    slots.ask(())
    slots.ask(())
    calls = [slot.call for slot in slots]
    wait_for(lambda: len(ray.wait(calls, num_returns=2, timeout=1, fetch_local=False)[0]) == 2)
    served = [said(slots)[0] for _ in range(2)]
    assert sorted(slot.number for slot in served) == [1, 2]


def test_an_actor_that_is_dropped_is_dead_and_says_nothing_more(slots, notes):
    slots.ask(())
    slot, placed = said(slots)
    slot.node = placed.node
    said(slots)
    assert slots.n_at() == {placed.node: 1}
    slots.drop(slot)
    assert (len(slots), slots.n_at()) == (0, {})
    assert slots.next_ready(0.0) is None
    slots.ask(())
    assert [slot.name for slot in slots] == ["worker 2"]


def test_a_call_that_is_given_up_while_it_waits_to_be_served_is_passed_over(slots):
    import ray

    slots.ask(())
    slots.ask(())
    calls = [slot.call for slot in slots]
    wait_for(lambda: len(ray.wait(calls, num_returns=2, timeout=1, fetch_local=False)[0]) == 2)
    first = slots.next_ready(0.0)
    other = next(slot for slot in slots if slot is not first)
    other.call = None
    assert slots.next_ready(0.0) is not other

"""Joining a cluster, whether its head is there, and what is said of it."""

import socket

import pytest

from searchmerge.errors import StudyError
from searchmerge.execution.ray.cluster import (
    HEAD_SILENT_S,
    Head,
    RaySettings,
    amounts,
    check_reachable,
    connect,
    place,
    short,
)

pytestmark = pytest.mark.ray


def test_a_process_connects_once(cluster):
    assert connect("local") is False
    assert connect("auto") is False


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"CPU": 4.0, "GPU": 1.0, "memory": 9e9}, "4 CPUs and 1 GPUs"),
        ({"CPU": 0.5}, "0.5 CPUs"),
        ({"GPU": 2.0, "CPU": 0.0}, "2 GPUs"),
        ({}, "none"),
    ],
)
def test_resources_are_said_in_words(resources, words):
    assert amounts(resources) == words


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("first\n  second  \n\n", "second"),
        ("It died. Some common causes include: (1) no memory", "It died."),
        ("", "ValueError"),
        ("x" * 900, "x" * 300),
    ],
)
def test_of_a_long_message_the_line_is_told_that_says_what_happened(message, line):
    assert short(ValueError(message)) == line


def test_a_cluster_is_called_by_its_address():
    assert place("local") == "this machine"
    assert place("head:6379") == "the cluster (head:6379)"


def test_an_address_is_reachable_where_something_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_reachable(address)
    with pytest.raises(
        StudyError, match=rf"ray\.address {address}: no cluster answers there \(.*"
    ):
        check_reachable(address)


def test_what_a_worker_needs_is_said_in_words():
    assert RaySettings(cpus=2.0, gpus=0.5).needs == "2 CPUs and 0.5 GPUs"


class Listening:
    """Something that listens at an address, or not."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self._name = self._server.getsockname()
        self.address = f"127.0.0.1:{self._name[1]}"

    def stop(self):
        self._server.close()

    def start(self):
        self._server = socket.create_server(self._name)


@pytest.fixture
def listening():
    listening = Listening()
    yield listening
    listening.stop()


def test_a_head_that_comes_back_is_waited_for(listening, caplog):
    seconds = iter((0.0, HEAD_SILENT_S - 1, 100.0, 100.0, 101.0))
    head = Head(listening.address, "the cluster", lambda: next(seconds))
    assert head.answers()
    listening.stop()
    assert not head.answers()
    assert "the Ray head of the cluster does not answer" in caplog.text
    listening.start()
    assert head.answers()
    listening.stop()
    assert not head.answers()  # the time counts anew
    assert not head.answers()


def test_a_head_that_does_not_come_back_ends_the_study_in_one_message(listening):
    seconds = iter((5.0, 5.0, 5.0 + HEAD_SILENT_S))
    head = Head(listening.address, "this machine", lambda: next(seconds))
    listening.stop()
    assert not head.answers()
    with pytest.raises(
        StudyError,
        match=rf"^the Ray head of this machine died: nothing answers at {listening.address} for "
        r"30 s .*the same command goes on$",
    ):
        head.answers()

"""How much room a cluster has, and what is said of it."""

import socket

import pytest

from searchmerge.errors import StudyError
from searchmerge.execution.ray.cluster import (
    RaySettings,
    amounts,
    check_reachable,
    connect,
    count_room,
    place,
    short,
)

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("settings", "room"),
    [
        (RaySettings(), 4),
        (RaySettings(cpus=0.5), 8),
        (RaySettings(cpus=0.1), 40),
        (RaySettings(cpus=3.0), 1),
        (RaySettings(cpus=5.0), 0),
        (RaySettings(gpus=0.5), 0),
    ],
)
def test_there_is_room_for_as_many_as_the_scarcest_resource_allows(cluster, settings, room):
    assert count_room(settings) == room


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

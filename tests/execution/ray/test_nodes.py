"""How many workers each node of a cluster has room for, and where they do not load."""

import pytest

from searchmerge.errors import StudyError
from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.ray.nodes import MAX_LOAD_DEATHS, Nodes

pytestmark = pytest.mark.ray


def row(name, is_alive=True, **resources):
    return {
        "NodeID": f"id of {name}",
        "NodeManagerHostname": name,
        "Alive": is_alive,
        "Resources": {"memory": 1e9, **resources},
    }


TWO_CPUS = RaySettings(cpus=2.0)


def nodes(*rows, settings=TWO_CPUS):
    nodes = Nodes(settings)
    nodes.update(rows)
    return nodes


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
def test_there_is_room_for_as_many_as_the_scarcest_resource_allows(settings, room):
    assert nodes(row("a", CPU=4.0), settings=settings).room == room


def test_a_node_is_there_until_it_is_not_alive():
    cluster = nodes(row("a", CPU=4.0), row("b", CPU=2.0), row("c", is_alive=False, CPU=8.0))
    assert (len(cluster), cluster.room) == (2, 3)
    assert "id of b" in cluster
    cluster.update([row("a", CPU=4.0), row("b", is_alive=False, CPU=2.0)])
    assert (len(cluster), cluster.room) == (1, 2)
    assert "id of b" not in cluster


def test_a_node_that_is_too_small_is_named_once(caplog):
    rows = row("large", CPU=4.0), row("small", CPU=1.0, GPU=1.0), row("head")
    cluster = nodes(*rows)
    cluster.update([*rows, row("late", CPU=1.0)])
    assert [record.getMessage() for record in caplog.records] == [
        "node small is not used: it has 1 CPUs and 1 GPUs, and a worker needs 2 CPUs",
        "node late is not used: it has 1 CPUs, and a worker needs 2 CPUs",
    ]


def test_where_no_node_has_room_none_is_named(caplog):
    assert not nodes(row("small", CPU=1.0)).room
    assert caplog.text == ""


def test_a_node_where_workers_die_as_they_load_has_to_do_with_those_it_has(caplog):
    cluster = nodes(row("a", CPU=8.0), row("b", CPU=4.0))
    assert [cluster.died_loading("id of a", 3) for _ in range(2)] == [1, 2]
    cluster.loaded("id of a")
    assert cluster.room == 6
    for n_died in range(1, MAX_LOAD_DEATHS + 1):
        assert cluster.full({"id of a": 3, "id of b": 2}) == []
        assert cluster.died_loading("id of a", 3) == n_died
    assert "3 workers in a row died as they loaded on node a: it is given no more" in caplog.text
    assert cluster.full({"id of a": 3, "id of b": 2}) == ["id of a"]
    assert cluster.full({"id of a": 2}) == []
    assert cluster.room == 5
    for n_died in range(1, MAX_LOAD_DEATHS + 1):
        assert cluster.room == 5
        assert cluster.died_loading("id of a", 0) == MAX_LOAD_DEATHS + n_died
    assert cluster.room == 2
    cluster.update([row("b", CPU=4.0)])
    assert cluster.full({}) == []


def test_of_workers_that_die_before_they_have_a_node_none_is_named(caplog):
    cluster = nodes(row("a", CPU=8.0))
    assert [cluster.died_loading("", 0) for _ in range(4)] == [1, 2, 3, 4]
    assert cluster.room == 4
    assert caplog.text == ""


def test_there_are_as_many_workers_as_are_asked_for_or_as_there_is_room_for_and_one_at_least():
    rows = row("a", CPU=4.0), row("b", CPU=2.0)
    assert nodes(*rows).n_wanted == 3
    assert nodes(*rows, settings=RaySettings(workers=8, cpus=2.0)).n_wanted == 8
    assert nodes().n_wanted == 1  # one that waits for a node


def test_a_machine_without_room_for_all_workers_is_refused_and_a_cluster_may_grow(caplog):
    rows = row("a", CPU=4.0), row("b", CPU=2.0, GPU=1.0), row("c", is_alive=False, CPU=9.0)
    told = (
        r"^5 workers of 2 CPUs each were asked for; this machine has 6 CPUs and 1 GPUs, room for 3"
        r"; lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker$"
    )
    with pytest.raises(StudyError, match=told):
        nodes(*rows, settings=RaySettings("local", workers=5, cpus=2.0)).check_room()
    nodes(*rows, settings=RaySettings("local", workers=3, cpus=2.0)).check_room()
    assert caplog.text == ""
    nodes(*rows, settings=RaySettings("auto", workers=5, cpus=2.0)).check_room()
    assert "room for 3; the others start when nodes join" in caplog.text


def test_a_cluster_without_room_for_a_single_worker_is_refused():
    with pytest.raises(StudyError, match=r"the cluster \(auto\) has 1 CPUs, room for 0; lower"):
        nodes(row("a", CPU=1.0), settings=RaySettings("auto", cpus=2.0)).check_room()

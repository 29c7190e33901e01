"""When a worker counts as hung."""

from searchmerge.execution.deadline import FACTOR, FIRST_S, LEAST_S, Deadline, Deadlines


def test_a_deadline_follows_the_longest_round_unless_it_is_given():
    derived = Deadline(None)
    assert derived.seconds == FIRST_S
    derived.saw(1.0)
    assert derived.seconds == LEAST_S
    derived.saw(100.0)
    derived.saw(2.0)
    assert derived.seconds == FACTOR * 100.0
    assert str(derived) == "its deadline (1000 s, derived; set ray.deadline in the config)"
    given = Deadline(7.0)
    given.saw(100.0)
    assert given.seconds == 7.0


def test_a_slow_node_is_not_measured_by_a_fast_one():
    deadlines = Deadlines(None)
    deadlines.at("fast").saw(1.0)
    assert deadlines.at("fast").seconds == LEAST_S
    assert deadlines.at("slow").seconds == FIRST_S
    deadlines.at("slow").saw(500.0)
    assert deadlines.at("slow").seconds == FACTOR * 500
    assert deadlines.at("fast").seconds == LEAST_S
    assert Deadlines(60.0).at("slow").seconds == 60.0


def test_gradients_are_not_measured_by_rounds():
    deadlines = Deadlines(None)
    deadlines.at("node").saw(1.0)
    assert deadlines.at("node", "gradient").seconds == FIRST_S
    deadlines.at("node", "gradient").saw(100.0)
    assert deadlines.at("node", "gradient").seconds == FACTOR * 100
    assert deadlines.at("node").seconds == LEAST_S

"""When a worker counts as hung."""

from searchmerge.execution.deadline import FACTOR, FIRST_S, LEAST_S, Deadline


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

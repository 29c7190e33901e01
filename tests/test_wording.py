"""Numbers of things, as a person says them."""

import pytest

from searchmerge.wording import counted


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 examples"), (1, "1 example"), (2, "2 examples"), (1000, "1000 examples")],
)
def test_one_thing_is_no_plural(n, said):
    assert counted(n, "example") == said


def test_a_plural_may_be_another_word():
    assert counted(1, "expert fits", "experts fit") == "1 expert fits"
    assert counted(3, "expert fits", "experts fit") == "3 experts fit"

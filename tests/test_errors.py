"""Every error is one line, whatever stands in the names that it speaks of."""

import pytest

from searchmerge import errors
from searchmerge.errors import SearchMergeError, printable

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SearchMergeError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_one_line_that_moves_no_cursor(kind):
    error = kind("no expert 'a\nb\x1b[31m' in study.yaml")
    assert str(error) == r"no expert 'a\nb\x1b[31m' in study.yaml"


def test_what_can_be_shown_is_shown_as_it_is():
    assert printable("β = 0.5, 语言 [/x]") == "β = 0.5, 语言 [/x]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_caller_can_catch_all_of_them_together(kind):
    with pytest.raises(SearchMergeError):
        raise kind("anything")

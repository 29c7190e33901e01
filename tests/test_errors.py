"""Messages of errors stand in one line, and move no cursor."""

import pickle

import pytest

from searchmerge import errors
from searchmerge.errors import EvaluationError, SearchMergeError, printable

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


def test_text_that_cannot_be_shown_is_escaped():
    assert printable("é [1] ok\\") == "é [1] ok\\"
    assert printable("a\nb\tc\x1b[2J\u202e\ud800") == "a\\nb\\tc\\x1b[2J\\u202e\\ud800"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_one_line_and_travels_to_another_process(kind):
    error = pickle.loads(pickle.dumps(kind("first\nsecond")))
    assert type(error) is kind
    assert isinstance(error, SearchMergeError)
    assert str(error) == "first\\nsecond"
    assert str(EvaluationError("plain")) == "plain"

"""Errors are told in one line, whatever users call their things."""

import pytest

from searchmerge.errors import (
    CheckpointError,
    DeviceFault,
    EvaluationError,
    SearchMergeError,
    SpecError,
    StudyError,
    printable,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("task 'Größe': β = 0.1", "task 'Größe': β = 0.1"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("right\u202eleft", r"right\u202eleft"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "kind", [CheckpointError, DeviceFault, EvaluationError, SpecError, StudyError]
)
def test_every_error_can_be_caught_as_one_and_is_one_line(kind):
    with pytest.raises(SearchMergeError) as caught:
        raise kind("expert 'a\nb'")
    assert str(caught.value) == r"expert 'a\nb'"

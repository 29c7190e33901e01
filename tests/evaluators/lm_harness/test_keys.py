"""What a study may say of an lm-eval task, before lm-eval is asked."""

import pytest

from searchmerge.evaluators.lm_harness.keys import LmTask


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (None, None)),
        ({"metric": "acc"}, ("acc", None)),
        ({"metric": "exact_match", "filter": "word"}, ("exact_match", "word")),
        ({"metric": "exact_match,word"}, ("exact_match", "word")),
    ],
)
def test_a_metric_may_bring_its_filter(keys, expected):
    assert LmTask("t", "test", **keys).metric_and_filter == expected


def test_a_filter_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a filter"):
        LmTask("t", "test", metric="exact_match,word", filter="first")

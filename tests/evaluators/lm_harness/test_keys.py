"""What a study may say of an lm-eval task, before lm-eval is asked."""

import pytest

from searchmerge.evaluators.lm_harness.keys import LmTask


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [(None, None)]),
        ({"metric": ("acc", "f1")}, [("acc", None), ("f1", None)]),
        ({"metric": ("exact_match",), "filter": "word"}, [("exact_match", "word")]),
        ({"metric": ("exact_match,word", "acc")}, [("exact_match", "word"), ("acc", None)]),
    ],
)
def test_a_metric_may_bring_its_filter(keys, expected):
    assert LmTask("t", "test", **keys).metrics_and_filters() == expected


def test_a_filter_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a filter"):
        LmTask("t", "test", metric=("exact_match,word",), filter="first")

"""What a study may say of an lm-eval task, before lm-eval is asked."""

import pytest

from searchmerge.evaluators.lm_harness.keys import LmTask, Samples


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


APART = {"select": "train", "hold_out": "test"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"split": "test"}, [("test", None)]),
        ({"split": {"a": "test", "rest": "dev"}}, [({"a": "test", "rest": "dev"}, None)]),
        ({"split": APART}, [("train", None), ("test", None)]),
        ({"split": {"select": "test", "hold_out": "test"}}, [("test", None)]),
        (
            {"split": {"select": {"a": "dev", "rest": "train"}, "hold_out": "test"}},
            [({"a": "dev", "rest": "train"}, None), ("test", None)],
        ),
        (
            {"split": APART, "samples": Samples((0, 1), (1, 2))},
            [("train", (0, 1)), ("test", (1, 2))],
        ),
        ({"split": "test", "samples": Samples((0,), (1, 2))}, [("test", (0,)), ("test", (1, 2))]),
        ({"split": "test", "samples": (2, 0)}, [("test", (2, 0))]),
    ],
)
def test_a_task_is_what_is_said_of_each_part(keys, expected):
    task = LmTask("t", num_fewshot=3, **keys)
    assert [(part.split, part.samples) for part in task.by_part()] == expected
    assert {part.num_fewshot for part in task.by_part()} == {3}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"split": {"select": "train"}},
            "split: select and hold_out stand together and alone; fou",
        ),
        ({"split": {**APART, "rest": "dev"}}, "alone; found select, hold_out, rest"),
        ({"split": {"a": {"b": "test"}}}, r"split\.a: name one split; found a mapping"),
        (
            {"split": APART, "samples": (0, 1)},
            r"samples: positions in which split\? give \{select",
        ),
        ({"split": "test", "samples": Samples((0, 1), (1,))}, "samples: a position stands twice"),
        ({"split": "test", "samples": Samples((0,), (0,))}, "samples: a position stands twice"),
        ({"split": APART, "samples": Samples((0, 0), (1,))}, "samples: a position stands twice"),
        ({"split": "test", "samples": (0, 0)}, "samples: a position stands twice"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LmTask("t", **keys)

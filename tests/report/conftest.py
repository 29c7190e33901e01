import pytest

from searchmerge.report.results import Bound, Detail, Point, Results, Row
from tests.search.test_trials import plan


@pytest.fixture
def make_results():
    """Make the results of a study of two tasks, one reference and one candidate."""

    def make(**changes):
        fields = {
            "study": "toy",
            "tasks": {"math": "acc", "code": "macro_f1"},
            "objective": "normalised",
            "rows": [
                Row("TIES", {"math": 0.5, "code": 0.25}, {"math": 0.4, "code": 0.3},
                    (0.9, 0.85, 0.95), is_candidate=False, lead=(0.2, 0.05, 0.35)),
                Row("trial 3", {"math": 0.75, "code": 0.5}, {"math": 0.7, "code": 0.45},
                    (1.1, 1.0, 1.2), is_candidate=True),
            ],
            "winner": "trial 3",
            "verdict": "The found merge is better than the best baseline, TIES, by +20.0 points.",
            "plan": plan(0.5).to_dict(),
            "counts": {"trials in full": 3, "trials stopped early": 2, "search seconds": 12},
            "level": 0.95,
            "made_of": {"base": "models/base, 0123abcd", "torch": "2.9"},
        }  # fmt: skip
        return Results(**{**fields, **changes})

    return make


@pytest.fixture
def bounds():
    return [
        Bound("math at least 0.9", 0.9, 0.95, 0.85),
        Bound("code at least 0.4 of the base's", 0.4, 0.5, 0.45),
    ]


@pytest.fixture
def details():
    return [
        Detail("math", "algebra", 3, {"TIES": 0.25, "trial 3": 0.5}),
        Detail("code", "acc", 8, {"TIES": 0.125, "trial 3": 0.75}),
    ]


@pytest.fixture
def points():
    return [
        Point("TIES", {"math": 0.5, "code": 0.25}, "reference"),
        Point("trial 1", {"math": 0.2, "code": 0.9}, "front"),
        Point("trial 2", {"math": 0.1, "code": 0.1}, "trial"),
        Point("trial 3", {"math": 0.75, "code": 0.5}, "front"),
    ]


@pytest.fixture
def drawn_from():
    return {"math": {"select": "split 'train'", "hold_out": "split 'test' of m<x>.jsonl"}}

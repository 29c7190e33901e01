"""The base, the experts alone and the published settings."""

import pytest

from searchmerge.merging.method import METHODS
from searchmerge.search.references import (
    BASE,
    expert_name,
    merges,
    reference_plans,
    slow_methods,
)


def test_every_expert_is_a_reference_and_no_merge():
    references = reference_plans(("math", "code"))
    assert list(references) == [
        "base", "expert math", "expert code",
        "average", "task arithmetic", "TIES", "DARE", "PCB", "TSV-M",
    ]  # fmt: skip
    assert references[BASE].values == {"coefficient": ((0.0, 0.0),)}
    assert references[expert_name("code")].values == {"coefficient": ((0.0, 1.0),)}
    assert [plan.method for plan in merges(references)] == [
        "linear", "task_arithmetic", "ties", "dare", "pcb", "tsv",
    ]  # fmt: skip


def test_published_settings_are_those_of_the_papers():
    references = reference_plans(("math", "code"))
    assert references["task arithmetic"].values["coefficient"] == ((0.4, 0.4),)
    assert references["TIES"].values == {"coefficient": ((1.0, 1.0),), "density": ((0.2, 0.2),)}
    assert references["PCB"].values == {"coefficient": ((1.0, 1.0),), "density": ((0.1, 0.1),)}
    assert references["TSV-M"].values == {"coefficient": ((1.0, 1.0),)}
    assert references["DARE"].values == {"coefficient": ((0.4, 0.4),), "density": ((0.8, 0.8),)}


def test_what_a_method_publishes_is_in_the_paper_that_it_cites():
    published = {name: METHODS[name].published for name in METHODS}
    names = [setting.name for setting in published.values() if setting is not None]
    assert len(set(names)) == len(names) > 0
    for name, setting in published.items():
        assert setting is None or f"arXiv:{setting.arxiv}" in METHODS[name].__doc__


@pytest.mark.parametrize(
    ("shape", "n_matrices", "n_experts", "is_slow"),
    [
        ((1000, 1000), 500, 4, False),
        ((1000, 1000), 501, 4, True),
        ((1000, 4000), 125, 4, False),
        ((4000, 1000), 126, 4, True),
        ((1000, 1000, 1000), 1000, 4, False),
    ],
)
def test_methods_that_take_large_matrices_apart_are_slow(shape, n_matrices, n_experts, is_slow):
    slow = slow_methods([shape, (10**9,)] * n_matrices, n_experts)
    assert slow == (["tsv"] if is_slow else [])
    names = set(reference_plans(("math", "code"), slow))
    assert ("TSV-M" in names) == (not is_slow)

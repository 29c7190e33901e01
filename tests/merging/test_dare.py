"""Dropping at random, by draws that depend on names and places alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from searchmerge.errors import SpecError
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors
from tests.merging import oracles
from tests.merging.test_ties_and_pcb import SHAPES, WHOLE_NUMBERS, drawn, merging


def draws_of(n_experts, d, seed):
    """Return what the oracle draws for the two parameters that ``vectors_of`` makes."""
    sizes = {"a": d // 3, "b": d - d // 3}
    return [
        np.concatenate([oracles.draws(seed, f"e{i}", name, n) for name, n in sizes.items()])
        for i in range(n_experts)
    ]


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_dare_is_the_papers(deltas, data):
    n, d = deltas.shape
    merged = merging(deltas, engine="eager")
    numbers = {"coefficient": drawn(data, n, -2, 2), "density": drawn(data, n, 0, 1)}
    seed = data.draw(st.integers(0, 2**31 - 1))
    for election in ("none", "ties", "ties"):
        # rescaled by different densities, what cancels would not cancel in both precisions
        rescale = election == "none" and data.draw(st.booleans())
        choices = {"election": election, "rescale": rescale}
        found = merged("dare", **numbers, **choices, seed=seed)
        expected = oracles.dare(deltas, *numbers.values(), draws_of(n, d, seed), **choices)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rescaling_comes_before_the_election():
    deltas = np.array([[3.0] * 600, [-4.0] * 600])
    numbers = {"coefficient": [1.0, 1.0], "density": [0.5, 1.0]}
    found = merging(deltas)("dare", election="ties", **numbers)
    expected = oracles.dare(deltas, *numbers.values(), draws_of(2, 600, 0), election="ties")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert set(found.tolist()) == {6.0, -4.0}  # 2 x 3 is more than 4


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_the_share_that_is_kept_and_the_mean_are_as_told(density):
    merged = merging(torch.ones(1, 400_000))
    found = merged("dare", density=density, coefficient=1.0)
    error = 5 * np.sqrt(density * (1 - density) / found.size)  # 5 standard deviations
    assert abs((found != 0).mean() - density) < error
    assert found.max() == pytest.approx(1 / density, rel=1e-6)


def test_the_seed_and_the_names_decide_what_is_dropped():
    deltas = torch.ones(2, 3000)

    def kept(experts=("one", "two"), names=("a", "b"), seed=0):
        base = {name: torch.zeros(3000) for name in names}
        own = {e: {name: torch.ones(3000) for name in names} for e in experts}
        plan = default_plan("dare", experts, density=0.5, seed=seed, coefficient=[1.0, 10.0])
        return dict(Merger(TaskVectors.from_weights(base, own)).merged(plan))

    first = kept()
    assert len(set(first["a"].tolist())) == len(deltas) ** 2
    assert not torch.equal(first["a"], first["b"])
    assert torch.equal(kept(names=("b",))["b"], first["b"])
    assert not torch.equal(kept(seed=1)["a"], first["a"])
    assert torch.equal(kept(experts=("one", "three"))["a"] % 10, first["a"] % 10)


def test_compiled_code_drops_the_same_entries():
    deltas = torch.randn(3, 5000)
    plan = {"density": [0.2, 0.5, 0.9], "seed": 2, "election": "ties"}
    found = merging(deltas, engine="compiled")("dare", **plan)
    expected = merging(deltas, engine="eager")("dare", **plan)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_settings_that_are_not_allowed_are_refused():
    with pytest.raises(SpecError, match="'election' of method 'dare' is 'sum'; allowed: none"):
        default_plan("dare", ("a",), election="sum")
    with pytest.raises(SpecError, match=r"'seed' of method 'dare' is 0\.5; allowed: a multiple"):
        default_plan("dare", ("a",), seed=0.5)

"""Averaging, task arithmetic, TIES and PCB against the papers' equations in float64."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from searchmerge.errors import SpecError
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors
from tests.merging import oracles

WHOLE_NUMBERS = st.integers(-6, 6).map(float)  # ties, zeros, and sums that cancel exactly
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 60))


def vectors_of(deltas):
    """Return task vectors with exactly these entries, over two parameters."""
    deltas = torch.as_tensor(np.asarray(deltas), dtype=torch.float32)
    cut = deltas.shape[1] // 3
    experts = {f"e{i}": {"a": own[:cut], "b": own[cut:]} for i, own in enumerate(deltas)}
    base = {"a": torch.zeros(cut), "b": torch.zeros(deltas.shape[1] - cut)}
    return TaskVectors.from_weights(base, experts)


def merging(deltas, **options):
    """Return a function that merges these task vectors by a method and its numbers."""
    vectors = vectors_of(deltas)
    merger = Merger(vectors, **options)

    def merged(method, **numbers):
        plan = default_plan(method, vectors.experts, **numbers)
        return torch.cat([tensor for _, tensor in merger.merged(plan)]).numpy()

    return merged


def drawn(data, n, low, high):
    numbers = st.floats(low, high, allow_nan=False).map(lambda x: round(x, 2))
    return data.draw(st.lists(numbers, min_size=n, max_size=n))


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_ties_is_the_papers(deltas, data):
    n = len(deltas)
    merged = merging(deltas, engine="eager")
    for aggregate in ("mean", "sum", "max", "mean"):
        numbers = {"coefficient": drawn(data, n, -2, 2), "density": drawn(data, n, 0, 1)}
        found = merged("ties", aggregate=aggregate, **numbers)
        expected = oracles.ties(deltas, *numbers.values(), aggregate=aggregate)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=WHOLE_NUMBERS), st.data())
def test_sums_and_averages_are_the_papers(deltas, data):
    merged = merging(deltas, engine="eager")
    numbers = drawn(data, len(deltas), 0.1, 2)
    for method in ("linear", "task_arithmetic"):
        expected = getattr(oracles, method)(deltas, numbers)
        found = merged(method, coefficient=numbers)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["reference", "nlp", "vision", "vision_es"])
@pytest.mark.parametrize("keep_bytes", [0, 2**20, 2**24])
@pytest.mark.parametrize(("n_experts", "zeros"), [(1, 0.0), (3, 0.0), (3, 0.3)])
def test_pcb_is_the_authors_however_much_is_kept(variant, keep_bytes, n_experts, zeros):
    draw = np.random.default_rng(n_experts)
    deltas = (0.05 * draw.standard_t(3, (n_experts, 20_000))).astype(np.float32)
    deltas[draw.random(deltas.shape) < zeros] = 0  # as in bfloat16: nothing to raise
    merged = merging(deltas, engine="eager", memory=Memory(keep_bytes=keep_bytes))
    for density in (0.1, 0.1, 0.1, 0.37, 1.0, 0.0):  # the same, so that shares come to be kept
        numbers = {
            "coefficient": list(draw.uniform(-1, 2, n_experts)),
            "density": [density] * n_experts,
        }
        found = merged("pcb", variant=variant, **numbers)
        expected = oracles.pcb(deltas.astype(np.float64), *numbers.values(), variant=variant)
        off = ~np.isclose(found, expected, rtol=3e-5, atol=3e-6)
        assert off.sum() <= len(off) // 1000, (density, off.sum())


def test_pcb_drops_the_entry_at_the_threshold_bit_for_bit():
    draw = torch.Generator().manual_seed(1)
    deltas = torch.randn(1, 50_001, generator=draw)
    for keep_bytes in (0, 2**24):
        merged = merging(deltas, engine="eager", memory=Memory(keep_bytes=keep_bytes))
        found = merged("pcb", density=0.2)
        d = deltas.shape[1]
        assert np.count_nonzero(found) == d - int(d * 0.8) - 1


def test_pcb_leaves_out_an_expert_equal_to_the_base_with_a_warning(caplog):
    deltas = torch.randn(3, 500)
    deltas[1] = 0
    with caplog.at_level(logging.WARNING):
        found = merging(deltas)("pcb", coefficient=[0.5, 9.0, 2.0])
    expected = merging(deltas[[0, 2]])("pcb", coefficient=[0.5, 2.0])
    assert (found == expected).all()
    assert "pcb leaves out expert 'e1'" in caplog.text


def test_pcb_of_experts_that_all_equal_the_base_is_the_base():
    assert (merging(torch.zeros(2, 50))("pcb") == 0).all()


def test_pcb_of_opposite_task_vectors_is_finite():
    draw = torch.randn(1, 300)
    assert np.isfinite(merging(torch.cat([draw, -draw]))("pcb")).all()


def test_pcb_refuses_more_experts_than_its_exponential_can_hold():
    with pytest.raises(SpecError, match="89 experts; allowed are up to 88"):
        merging(torch.ones(89, 2))("pcb")


def test_a_density_of_zero_keeps_the_largest_entry_and_one_trims_nothing():
    merged = merging([[1.0, -5.0, 2.0, 0.0]])
    assert merged("ties", density=0.0).tolist() == [0, -5, 0, 0]
    assert merged("ties", density=1.0).tolist() == [1, -5, 2, 0]


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_wrong_guess_at_the_majority_is_put_right(first):
    """The first column cancels; the sign that it takes is known after the pass only."""
    deltas = torch.tensor([[3.0, -1.0, -1.0, -1.0, 1.0], [-3.0, -1.0, -1.0, -1.0, 1.0]]) * first
    vectors = vectors_of(deltas)
    targets = {name: torch.full_like(tensor, 7.0) for name, tensor in vectors.base.items()}
    merger = Merger(vectors, targets=targets)
    plan = default_plan("ties", vectors.experts, density=1.0)
    expected = oracles.ties(deltas.double().numpy(), [1, 1], [1, 1])
    for _ in range(2):  # guessed, then known
        merger.apply(plan)
        assert torch.cat(list(targets.values())).tolist() == expected.tolist()
        assert torch.cat([t for _, t in merger.merged(plan)]).tolist() == expected.tolist()
    assert expected[0] == -3 * first

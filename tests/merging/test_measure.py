"""What methods measure is computed right, once, and within the memory that they may keep."""

import numpy as np
import pytest
import torch

from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.task_vectors import TaskVectors

EXPERTS = ("math", "code", "law")
SHAPES = {"a": (30, 7), "b": (11,), "c": (5, 13)}
N_PARAMETERS = 30 * 7 + 11 + 5 * 13


def vectors(experts=EXPERTS):
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    changed = {
        expert: {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in base.items()}
        for expert in EXPERTS
    }
    return TaskVectors.from_weights(base, {expert: changed[expert] for expert in experts})


def measure(own=None, keep_bytes=0, **more):
    return Measure(own or vectors(), Engine("eager"), MemoryBudget(keep_bytes), **more)


def flat(own, expert):
    row = own.experts.index(expert)
    return np.concatenate(
        [(own.weights[n][row] - own.base[n]).flatten().double().numpy() for n in own.weights]
    )


def test_magnitudes_are_ranks_of_the_whole_task_vector():
    own = vectors()
    ranks = (0, 100, N_PARAMETERS - 1)
    expected = [np.sort(np.abs(flat(own, e)))[r] for e, r in zip(EXPERTS, ranks, strict=True)]
    assert measure(own).magnitudes(ranks) == pytest.approx(expected, rel=1e-6)


def test_what_is_measured_of_all_experts_serves_some_of_them():
    everyone = measure()
    some = measure(vectors(("math", "law")), everyone=everyone)
    assert some.magnitudes((3, 9)) == everyone.magnitudes((3, 0, 9))[::2]
    assert some.tensor_magnitudes("a", (3, 9)) == everyone.tensor_magnitudes("a", (3, 0, 9))[::2]


def test_magnitudes_within_a_tensor_are_those_of_a_sort():
    own = vectors()
    for row, expert in enumerate(EXPERTS):
        delta = (own.weights["c"][row] - own.base["c"]).abs().flatten().sort().values
        for rank in (0, 17, 64):
            ranks = [rank] * len(EXPERTS)
            assert measure(own).tensor_magnitudes("c", ranks)[row] == float(delta[rank]), expert


def test_inner_products_are_those_of_float64():
    own = vectors()
    products = measure(own).inner_products()
    assert products.keys() == SHAPES.keys()
    for name, found in products.items():
        deltas = torch.stack([t - own.base[name] for t in own.weights[name]]).double()
        expected = torch.einsum("i...,j...->ij", deltas, deltas).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def numbers(name, part):
    """Return the sum and the product of the first two task vectors."""
    first, second = (expert - part.base for expert in part.experts[:2])
    return first + second, first * second


def test_numbers_are_kept_where_the_budget_allows_it_and_only_there():
    own, size = vectors(), 4 * 2 * N_PARAMETERS
    roomy = measure(own, keep_bytes=size)
    kept = roomy.keep(numbers, 2)
    assert roomy.budget.left_bytes == 0
    for name in SHAPES:
        first, second = ((t - own.base[name]).flatten() for t in own.weights[name][:2])
        assert torch.equal(kept[name][0], first + second)
        assert torch.equal(kept[name][1], first * second)
    tight = measure(own, keep_bytes=size - 1)
    assert tight.keep(numbers, 2) is None
    assert tight.budget.left_bytes == size - 1


def test_whole_numbers_without_room_are_computed_each_time_and_said_so(caplog):
    calls = []

    def doubled(name, deltas):
        calls.append(name)
        return (2 * deltas[0],)

    own = measure(keep_bytes=10)
    with caplog.at_level("WARNING"):
        found = own.keep_whole(doubled, 1)
    assert "there is no memory to keep what is measured" in caplog.text
    assert calls == []
    assert torch.equal(found["b"][0], 2 * own.deltas("b")[0])
    assert torch.equal(found["b"][0], found["b"][0])
    assert calls == ["b"] * 3
    own.release(found)
    assert own.budget.left_bytes == 10


def test_what_was_kept_is_given_back_when_it_is_replaced():
    own = measure(keep_bytes=2**20)
    method = METHODS["iso_c"](own)
    for ratio in (0.1, 0.2, 0.3, 0.4):  # each decomposes anew
        work = method.bind(default_plan("iso_c", EXPERTS, coefficient=[1.0, ratio, 1.0]))
        assert work.kept.keys() == SHAPES.keys()
        assert own.budget.left_bytes == 2**20 - 4 * N_PARAMETERS


def test_an_expert_equal_to_the_base_is_told():
    base = {"w": torch.ones(3)}
    own = measure(TaskVectors.from_weights(base, {"same": {"w": torch.ones(3)}}))
    assert own.is_zero("same")
    assert not measure().is_zero("math")


def test_a_cache_is_read_by_those_alone_who_measure_the_same(tmp_path):
    first = measure(cache=tmp_path / "k").magnitudes((1, 2, 3))
    [file] = tmp_path.iterdir()
    changed = file.stat().st_mtime_ns
    assert measure(cache=tmp_path / "k").magnitudes((1, 2, 3)) == first
    assert file.stat().st_mtime_ns == changed
    measure(vectors(("code", "law")), cache=tmp_path / "k").magnitudes((1, 2))
    assert len(list(tmp_path.iterdir())) == 2

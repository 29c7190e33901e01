"""The small operations, and scalars that are read by name."""

from typing import NamedTuple

import pytest
import torch

from searchmerge.merging.kernels import (
    Chunk,
    add_scaled,
    add_up,
    exact_sum,
    is_at_least,
    is_positive,
    is_zero,
    keep_at_least,
    pack,
    signed,
    unpack,
)


class Toy(NamedTuple):
    thresholds: object
    majority: object
    weights: object


def test_scalars_come_back_by_name_with_one_number_for_all_repeated():
    packed = pack(Toy(thresholds=[0.1, 0.2], majority=-1.0, weights=torch.tensor([3.0, 4.0])))
    assert (packed.shape, packed.dtype) == ((3, 2), torch.float32)
    scalars = unpack(Toy, Chunk((torch.zeros(5),) * 2, packed))
    assert torch.equal(scalars.thresholds, torch.tensor([0.1, 0.2]))
    assert scalars.majority.tolist() == [-1.0, -1.0]
    assert scalars.weights.tolist() == [3.0, 4.0]


def test_rows_of_different_lengths_are_not_packed():
    with pytest.raises(RuntimeError, match="expanded size"):
        pack(Toy([0.1, 0.2], 1.0, [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("threshold", [0.0, 1e-45, 0.5, 1.0, 3.4e38])
def test_trimming_keeps_what_is_at_the_threshold(threshold):
    numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 1.0, -1.0, -3.4e38])
    expected = torch.where(numbers.abs() >= threshold, numbers, 0.0)
    assert torch.equal(keep_at_least(numbers.clone(), torch.tensor(threshold)), expected)


def test_the_small_operations_are_what_they_say():
    numbers = torch.tensor([0.0, 2.0, -3.0])
    assert add_scaled(numbers.clone(), numbers, torch.tensor(2.0)).tolist() == [0, 6, -9]
    assert add_up([numbers]).tolist() == [0, 2, -3]
    assert add_up([numbers] * 3).tolist() == [0, 6, -9]
    assert is_zero(numbers).tolist() == [1, 0, 0]
    assert is_positive(numbers.abs()).tolist() == [0, 1, 1]
    assert is_at_least(numbers, 0.0).tolist() == [1, 1, 0]
    assert is_at_least(numbers, torch.tensor(2.0)).tolist() == [0, 1, 0]
    assert signed(torch.tensor([5.0, 6.0, 7.0]), numbers).tolist() == [0, 6, -7]
    assert exact_sum(numbers) == -1
    assert numbers.tolist() == [0, 2, -3]

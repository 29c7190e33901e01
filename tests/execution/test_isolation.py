"""Examples without a finite loss are found among others, in few passes."""

import numpy as np
import pytest
import torch

from searchmerge.errors import EvaluationError
from searchmerge.execution.isolation import Isolation, scales, told

N = 64


class Losses:
    """A loss of w times each example's number, and its gradient by w."""

    def __init__(self, nan=(), steep=(), largest=float("inf")):
        self._nan, self._steep, self._largest = set(nan), set(steep), largest
        self._weight = torch.ones((), requires_grad=True)
        self.passes = []

    def mean(self, task, examples):
        self.passes.append(tuple(examples))
        loss = self._weight * torch.tensor(examples, dtype=torch.float32).mean()
        if self._steep & set(examples):
            loss = loss + (self._weight - self._weight).sqrt()
        return loss * float("nan") if self._nan & set(examples) else loss

    def rows(self):
        gradient, self._weight.grad = float(self._weight.grad), None
        return ((gradient if abs(gradient) <= self._largest else float("inf"),),)


def isolation(losses, n_examples=N, scale=1.0, *, gradient=True):
    return Isolation(losses.mean, losses.rows if gradient else None, scale, n_examples)


def test_what_is_finite_is_one_pass():
    losses = Losses()
    total = isolation(losses).sum_of("math", range(N), N, 0.5)
    assert (total.n, total.loss, total.mean) == (N, sum(range(N)), sum(range(N)) / N)
    assert np.sum(total.rows) == 0.5 * sum(range(N))
    assert losses.passes == [tuple(range(N))]


@pytest.mark.parametrize("gradient", [True, False])
def test_one_example_is_found_in_few_passes_and_the_others_are_summed(gradient):
    losses = Losses(nan=[37])
    apart = isolation(losses, gradient=gradient)
    total = apart.sum_of("math", range(N), N, 1.0)
    assert told(apart.left_out) == ["task 'math', example 37: its loss is nan"]
    assert (total.n, total.loss) == (N - 1, sum(range(N)) - 37)
    assert np.sum(total.rows) == (sum(range(N)) - 37 if gradient else 0.0)
    assert len(losses.passes) == 1 + 2 * 6  # two halves at each of log2(64) levels


def test_a_gradient_that_is_not_finite_leaves_its_example_out():
    apart = isolation(Losses(steep=[5, 9]))
    total = apart.sum_of("math", range(N), N, 1.0)
    assert set(apart.left_out["math"]) == {5, 9}
    assert np.sum(total.rows) == sum(range(N)) - 5 - 9


def test_no_more_than_fit_are_run_at_once():
    losses = Losses()
    isolation(losses).sum_of("math", range(N), 16, 1.0)
    assert [len(examples) for examples in losses.passes] == [16] * 4


def test_what_overflows_is_scaled_less_and_is_the_same():
    expected = isolation(Losses()).sum_of("math", range(N), N, 1.0)
    losses = Losses(largest=5000.0)
    total = isolation(losses, scale=1024.0).sum_of("math", range(N), N, 1.0)
    assert total == expected
    assert len(losses.passes) == 6
    assert list(scales(1024.0))[-2:] == [4.0, 1.0]
    assert list(scales(1.0)) == [1.0]


def test_nothing_but_what_is_left_out_has_no_mean():
    apart = isolation(Losses(nan=[0]))
    total = apart.sum_of("math", [0], 1, 1.0)
    assert total.n == 0
    assert total.mean != total.mean  # NaN
    assert (apart.sum_of("math", [1], 1, 1.0) + total).mean == 1.0


def test_where_most_are_not_finite_not_all_are_asked():
    losses = Losses(nan=range(8))
    message = "5 or more of 8 examples .*; task 'math', example 0: its loss is nan"
    with pytest.raises(EvaluationError, match=message):
        isolation(losses, 8).sum_of("math", range(8), 8, 1.0)

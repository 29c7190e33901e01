"""Means, scores of records and scores at once, by one set of questions."""

import pickle
from functools import partial

import numpy as np
import pytest

from searchmerge.evaluators.classification import macro_f1
from searchmerge.evaluators.score_kind import Mean, OfRecords, Whole

F1 = partial(macro_f1, n_classes=2)
KINDS = [Mean(), OfRecords(F1), Whole()]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)


def values(kind, n=6):
    return (0.0, 3.0, 1.0, 3.0, 2.0, 0.0)[: kind.n_values(n)]


@by_kind
def test_the_mean_of_the_observations_is_the_score(kind):
    observations = kind.observations(values(kind))
    assert len(observations) == kind.n_observations(6)
    assert np.mean(observations) == pytest.approx(kind.score(values(kind)))


@by_kind
def test_observations_stand_block_by_block(kind):
    size = kind.block_size(6, 4)
    sizes = [min(size, 6 - start) for start in range(0, 6, size)]
    assert sum(kind.n_values(n) for n in sizes) == len(values(kind))
    assert sum(kind.n_observations(n) for n in sizes) == len(kind.observations(values(kind)))
    assert size == 4 or sizes == [6]


@by_kind
def test_every_example_once_resamples_to_the_score(kind):
    once = np.ones((2, kind.n_values(6)), dtype=np.int64)
    assert kind.resampled(values(kind), once) == pytest.approx([kind.score(values(kind))] * 2)


@pytest.mark.parametrize("kind", KINDS[:2], ids=["Mean", "OfRecords"])
def test_an_example_drawn_twice_counts_twice(kind):
    counts = np.array([[2, 0, 1, 3, 0, 0], [0, 1, 1, 1, 1, 2]])
    expected = [kind.score(np.repeat(values(kind), drawn).tolist()) for drawn in counts]
    assert kind.resampled(values(kind), counts) == pytest.approx(expected)


def test_one_number_cannot_be_resampled():
    assert Whole().resampled((0.7,), np.array([[1], [1], [1]])) == [0.7] * 3


@by_kind
def test_a_kind_is_sent_between_processes(kind):
    sent = pickle.loads(pickle.dumps(kind))
    assert sent.score(values(sent)) == kind.score(values(kind))

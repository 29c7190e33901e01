"""The resident model itself answers, in the way that it is told to."""

import pytest

from searchmerge.evaluators.causal.tuning import Way
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from tests.evaluators.models import tiny_model


def test_nothing_is_measured_on_a_cpu():
    def score():
        raise AssertionError("nothing is to be scored")

    assert TransformersBackend(64).tune(tiny_model("llama"), score, may_grow=True) == {}


def test_it_scores_in_the_way_that_it_is_told_to_until_it_is_told_otherwise():
    model, backend, n_passes = tiny_model("llama"), TransformersBackend(32), []
    pairs = [((1, 2, 3 + i % 5, i), (7, 8 + i % 3)) for i in range(40)]
    usual = [value for value, _ in backend.score(model, pairs, 64)]  # sees how it may be packed
    model.register_forward_pre_hook(lambda *_: n_passes.append(1))
    told = []
    for way in (Way(), Way(growth=4), Way()):
        n_passes.clear()
        backend.use(way)
        scored = [value for value, _ in backend.score(model, pairs, 64)]
        assert scored == pytest.approx(usual, rel=1e-4)
        told.append(len(n_passes))
    assert told[0] == told[2] > told[1]

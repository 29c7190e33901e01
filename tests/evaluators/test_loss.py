"""Losses without labels, beside scipy's."""

import pytest
import torch
from scipy import stats

from searchmerge.evaluators.loss import disagreement, entropy

DRAW = torch.Generator().manual_seed(0)
GIVEN = [torch.randn(n, generator=DRAW).log_softmax(0) for n in (2, 3, 5)]
TEACHER = [torch.randn(n, generator=DRAW).log_softmax(0) for n in (2, 3, 5)]


def test_entropy_is_the_mean_over_examples():
    expected = sum(stats.entropy(p.exp().numpy()) for p in GIVEN) / 3
    assert float(entropy(GIVEN)) == pytest.approx(expected, rel=1e-5)


def test_disagreement_is_the_mean_divergence_from_the_teacher():
    pairs = zip(GIVEN, TEACHER, strict=True)
    expected = sum(stats.entropy(t.exp().numpy(), p.exp().numpy()) for p, t in pairs) / 3
    assert float(disagreement(GIVEN, TEACHER)) == pytest.approx(expected, rel=1e-5)
    assert float(disagreement(TEACHER, TEACHER)) == pytest.approx(0.0, abs=1e-6)

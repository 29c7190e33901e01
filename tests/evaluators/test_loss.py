"""Losses without labels, beside scipy's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from searchmerge.evaluators.loss import disagreement, entropy

DRAW = torch.Generator().manual_seed(0)
GIVEN = [torch.randn(n, generator=DRAW).log_softmax(0) for n in (2, 3, 5)]
TEACHER = [torch.randn(n, generator=DRAW).log_softmax(0) for n in (2, 3, 5)]


def test_entropy_is_that_of_each_example():
    expected = [stats.entropy(p.exp().numpy()) for p in GIVEN]
    assert entropy(GIVEN).tolist() == pytest.approx(expected, rel=1e-5)


def test_disagreement_is_each_examples_divergence_from_the_teacher():
    pairs = zip(GIVEN, TEACHER, strict=True)
    expected = [stats.entropy(t.exp().numpy(), p.exp().numpy()) for p, t in pairs]
    assert disagreement(GIVEN, TEACHER).tolist() == pytest.approx(expected, rel=1e-5)
    assert disagreement(TEACHER, TEACHER).tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_of_several_positions_it_is_the_mean_over_them():
    given, teacher = (torch.randn(4, 6, generator=DRAW).log_softmax(1) for _ in range(2))
    each = entropy(given.unbind())
    assert float(entropy([given])) == pytest.approx(float(each.mean()), rel=1e-5)
    apart = disagreement(given.unbind(), teacher.unbind())
    assert float(disagreement([given], [teacher])) == pytest.approx(float(apart.mean()), rel=1e-5)


def test_an_answer_that_cannot_be_given_counts_for_nothing():
    logits, others = torch.randn(2, 5, generator=DRAW).unbind()
    masked = torch.cat([logits, torch.tensor([-torch.inf])]).requires_grad_()
    teacher = torch.cat([others, torch.tensor([-torch.inf])]).log_softmax(0)
    for made, expected in [
        (entropy([masked.log_softmax(0)]), entropy([logits.log_softmax(0)])),
        (
            disagreement([masked.log_softmax(0)], [teacher]),
            disagreement([logits.log_softmax(0)], [others.log_softmax(0)]),
        ),
    ]:
        torch.testing.assert_close(made.detach(), expected)
        [gradient] = torch.autograd.grad(made.sum(), masked)
        assert torch.isfinite(gradient).all()
        assert gradient[-1] == 0


@given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=6),
    st.lists(st.floats(-4, 4), min_size=6, max_size=6),
)
def test_gradients_are_what_finite_differences_give(logits, others):
    at = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(others[: len(logits)], dtype=torch.float64).log_softmax(0)
    for loss in (entropy, lambda given: disagreement(given, [teacher])):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss([z.log_softmax(0)]), at)

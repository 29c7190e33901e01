"""Losses that need no label, of an evaluator's distributions over answers.

Labelled ones are each evaluator's own: it knows what is right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Return the mean entropy of distributions, in nats (AdaMerging: arXiv:2310.02575, eq. 4).

    Args:
        log_probabilities: Of each example's answers, ``(n_answers,)``.
    """
    return torch.stack([-(p.exp() * p).sum() for p in log_probabilities]).mean()


def disagreement(log_probabilities: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean Kullback-Leibler divergence of a teacher's distributions, in nats.

    Args:
        log_probabilities: Of each example's answers, ``(n_answers,)``.
        teacher: The same, as the task's own expert has them.
    """
    divergences = [
        (expected.exp() * (expected - given)).sum()
        for given, expected in zip(log_probabilities, teacher, strict=True)
    ]
    return torch.stack(divergences).mean()

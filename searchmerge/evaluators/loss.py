"""Losses that need no label, of an evaluator's distributions over answers.

Labelled ones are each evaluator's own: it knows what is right. An example of several positions,
such as a text, counts as the mean over them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Return the entropy of each example, in nats (AdaMerging: arXiv:2310.02575, eq. 4).

    Args:
        log_probabilities: Of each example's answers, ``(n_answers,)`` or
            ``(n_positions, n_answers)``; an answer that cannot be given has -inf.

    Returns:
        ``(n_examples,)``.
    """
    finite = [p.clamp(min=torch.finfo(p.dtype).min) for p in log_probabilities]
    return torch.stack([-(p.exp() * p).sum(-1).mean() for p in finite])


def disagreement(log_probabilities: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return each example's Kullback-Leibler divergence from a teacher's answers, in nats.

    Args:
        log_probabilities: As for :func:`entropy`.
        teacher: The same, as the task's own expert has them; where one of them has -inf the
            other has too, or it is no answer.

    Returns:
        ``(n_examples,)``.
    """
    divergences = []
    for given, expected in zip(log_probabilities, teacher, strict=True):
        apart = (expected - given).masked_fill(expected == -torch.inf, 0.0)
        divergences.append((expected.exp() * apart).sum(-1).mean())
    return torch.stack(divergences)

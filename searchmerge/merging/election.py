"""Electing signs: entries of several task vectors agree on one, and those that differ are left."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from searchmerge.merging.kernels import (
    add_scaled,
    add_up,
    exact_sum,
    is_zero,
    n_positive,
)
from searchmerge.merging.method import Pass


def merge_elected(
    deltas: Sequence[Tensor], coefficients: Tensor, majority: Tensor, aggregate: str
) -> tuple[Tensor, Tensor]:
    r"""Elect signs and merge (Yadav et al., 2023, arXiv:2306.01708, Algorithm 1, steps 2 and 3).

    .. math:: \tau_m = \frac{1}{|A|} \sum_{t \in A} \lambda_t \tau_t, \qquad
              A = \{t : \operatorname{sgn} \tau_t = \operatorname{sgn} \sum_s \tau_s\}

    Args:
        deltas: What is left of each task vector, ``(m,)`` float32; overwritten.
        coefficients: One per expert.
        majority: The sign of a zero sum.
        aggregate: ``mean`` of those that agree, their ``sum``, or the ``max`` in magnitude.

    Returns:
        The merged task vector ``(m,)``, 0 where nothing is left; and the tally ``(2,)``: entries
        elected positive minus negative; and a number above 0 if there is a zero sum of entries
        that are not 0.
    """
    signs, undecided, balance = _elect(add_up(deltas), majority)
    agreeing = [own.mul_(signs).relu_() for own in deltas]  # magnitudes
    if aggregate == "max":
        merged = _largest(agreeing, coefficients)
    else:
        merged = agreeing[0] * coefficients[0]
        for i, own in enumerate(agreeing[1:], start=1):
            merged = add_scaled(merged, own, coefficients[i])
    n_agreeing = n_positive(agreeing)
    ambiguous = exact_sum(undecided.mul_(n_agreeing))
    if aggregate == "mean":
        merged = merged.div_(n_agreeing.sub_(1.0).relu_().add_(1.0))
    return merged.mul_(signs), torch.stack([balance, ambiguous])


def _elect(total: Tensor, majority: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elected signs; 1 where the sum is 0; and elected positive minus negative."""
    undecided = is_zero(total)
    if torch.compiler.is_compiling():  # fewer comparisons than a sign takes
        decided = torch.where(total > 0, 1.0, -1.0)
        balance = exact_sum(torch.where(total == 0, 0.0, decided))
        return torch.where(total == 0, majority, decided), undecided, balance
    signs = total.sign_()
    balance = exact_sum(signs)
    return add_scaled(signs, undecided, majority), undecided, balance


def _largest(magnitudes: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Return the largest magnitude times its expert's coefficient, their mean where equal."""
    largest = magnitudes[0]
    for own in magnitudes[1:]:
        largest = torch.maximum(largest, own)
    merged, n_ties = torch.zeros_like(largest), torch.zeros_like(largest)
    for i, own in enumerate(magnitudes):
        ties = is_zero(own - largest)
        merged = add_scaled(merged, ties, coefficients[i])
        n_ties = n_ties.add_(ties)
    return merged.div_(n_ties).mul_(largest)


class Majority:
    """The sign elected most often in a whole model, which exact zero sums take.

    Only a pass over the model tells it. It is guessed at first, and the pass done again where
    the guess was wrong and mattered.
    """

    def __init__(self) -> None:
        self._last = 1.0  # the last one found: the best guess at the next
        self._known: dict[object, float] = {}

    def settle(self, key: object, make: Callable[[float], Pass]) -> Pass:
        """Return the pass to do first; it revises itself.

        Args:
            key: All that the election depends on.
            make: The pass, given 1, -1, or 0 where as many signs are positive as negative. Its
                function returns the tally of :func:`merge_elected`.
        """
        if key in self._known:
            return make(self._known[key])
        assumed = self._last

        def revise(tally: Tensor) -> Pass | None:
            found, ambiguous = float(torch.sign(tally[0])), bool(tally[1])
            self._known[key] = found
            self._last = found or self._last
            if found == assumed or not ambiguous:
                return None
            return make(found)

        return replace(make(assumed), revise=revise)

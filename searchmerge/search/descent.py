"""Descent on the coefficients of a plan: Adam, and how much of its way is kept."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from searchmerge.errors import SpecError
from searchmerge.merging.groups import assign_groups
from searchmerge.merging.method import Hyperparameter, linear_hyperparameter
from searchmerge.plan import Groups, MergePlan, Rows

Array = npt.NDArray[np.float64]

DIGITS = 4
"""Decimals of a coefficient that was learnt: the next ones change no answer."""

_MEAN, _SQUARE = 0.9, 0.99  # Adam's beta_1 and beta_2 (a shorter memory)
_EPSILON = 0.01
"""Adam's, as a part of the root mean square of the whole gradient: where a coefficient changes
nothing, as that of a key's bias in attention, its gradient is what rounding left: no way to go.
"""


def regrouped(plan: MergePlan, groups: Groups, names: tuple[str, ...]) -> MergePlan:
    """Return a plan that makes the same model and has a row for each of other, finer groups.

    Args:
        plan: Any plan.
        groups: Each of them within one group of the plan, or of groups with equal rows.
        names: Of all parameters that are merged.

    Raises:
        SpecError: If a group has parameters of groups with different rows.
    """
    before, after = assign_groups(names, plan.groups), assign_groups(names, groups)
    values: dict[str, Rows] = {}
    for name, rows in plan.values.items():
        row_of: dict[int, tuple[float, ...]] = {}
        for parameter in names:
            row = rows[before[parameter]]
            if row_of.setdefault(after[parameter], row) != row:
                raise SpecError(
                    f"refine: group {groups.names[after[parameter]]!r} has parameters with "
                    f"different {name} in the plan that it would begin from; refine by groups "
                    "within its own"
                )
        values[name] = tuple(row_of[group] for group in range(len(groups)))
    return replace(plan, values=values, groups=groups)


@dataclass(frozen=True, slots=True)
class Path:
    """The coefficients of plans that differ in them alone.

    Attributes:
        start: The first plan.
        name: Of the hyper-parameter that the method is linear in.
    """

    start: MergePlan
    name: str

    @classmethod
    def of(cls, start: MergePlan) -> "Path":
        """Return the path that begins at a plan.

        Raises:
            SpecError: If its method is not linear in its coefficients.
        """
        return cls(start, linear_hyperparameter(start.method).name)

    @property
    def legal(self) -> Hyperparameter:
        """Return what the method allows of the coefficients."""
        return linear_hyperparameter(self.start.method)

    @property
    def first(self) -> Array:
        """Return the start's coefficients, ``(n_groups, n_experts)``."""
        return np.array(self.start.values[self.name])

    @property
    def size(self) -> float:
        """Return how large the start's coefficients are on average; the default of all zeros."""
        return float(np.abs(self.first).mean()) or self.legal.default

    def plan(self, coefficients: Array) -> MergePlan:
        """Return the plan with other coefficients, rounded, within what the method allows."""
        inside = np.clip(coefficients, self.legal.low, self.legal.high).round(DIGITS)
        rows = tuple(tuple(row) for row in inside.tolist())
        return replace(self.start, values={**self.start.values, self.name: rows})

    def part(self, coefficients: Array, shrink: float) -> Array:
        """Return what is a part of the way from the start; 1 is all of it."""
        return self.first + shrink * (coefficients - self.first)


class Adam:
    r"""Adam (Kingma and Ba, 2014, arXiv:1412.6980) on coefficients, with a rate that falls to 0.

    Args:
        first: Where it begins, ``(n_groups, n_experts)``.
        rate: The size of the first steps.
        n_steps: Of all steps; the rate falls linearly over their second half.
    """

    def __init__(self, first: Array, rate: float, n_steps: int) -> None:
        self.at = first.copy()
        self._rate = rate
        self._n_steps = n_steps
        self._step = 0
        self._mean, self._square = np.zeros_like(first), np.zeros_like(first)

    def step(self, gradient: Array) -> None:
        """Take one step against a gradient, ``(n_groups, n_experts)``."""
        self._step += 1
        self._mean = _MEAN * self._mean + (1 - _MEAN) * gradient
        self._square = _SQUARE * self._square + (1 - _SQUARE) * gradient**2
        mean = self._mean / (1 - _MEAN**self._step)
        square = self._square / (1 - _SQUARE**self._step)
        epsilon = _EPSILON * np.sqrt(np.mean(square))
        size = np.sqrt(square) + max(epsilon, np.finfo(float).tiny)
        left = 1 - (self._step - 1) / self._n_steps
        self.at = self.at - self._rate * min(1.0, 2 * left) * mean / size

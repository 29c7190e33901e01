r"""What scores say of how good plans are, once chance is taken off.

A score is a mean over examples, and of many plans the best score is the luckiest: what was chosen
by it is worse than it looks. The more a score owes to chance, the more it is drawn to what plans
of the study usually score.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

Observations = Mapping[str, Mapping[str, Vector]]
"""Plan name to task to its observations, ``(n_examples,)``: the same examples for all plans."""

_LEAST_SPREAD = 0.3
"""What a few plans say of how far plans truly differ is chance too: that is taken for this part of
the variance of a value's error at least, so that further examples still count."""

_TINY = 1e-18
_UNTOLD = 1e3  # variance of a value of which nothing is known


@dataclass(frozen=True, slots=True)
class Measured:
    """What some plans scored on the same examples, relative to one another.

    Attributes:
        names: The plans.
        values: Of each the objective, minus the mean of all.
        variances: Of the values' errors: of examples that are another draw.
    """

    names: tuple[str, ...]
    values: Vector
    variances: Vector

    @classmethod
    def of(cls, observations: Observations, units: Mapping[str, float]) -> "Measured":
        r"""Compare plans example by example.

        With :math:`d_{pe} = o_{pe} - \bar o_{\cdot e}` on n examples of a task, what its mean
        :math:`\bar d_p` owes to the draw of examples has the variance
        :math:`\sum_e (d_{pe} - \bar d_p)^2 / (n (n - 1))`; tasks add up, each in the objective's
        units. What is hard or easy for all plans alike is no noise. A few examples on which a
        plan differs alike, or a single one, do not make that certain: the variance is that at
        least which one example gives that differs as plans do on average.

        Args:
            observations: Of two plans or more.
            units: Task to by how much the objective grows with its score.
        """
        names = tuple(observations)
        values, variances = np.zeros(len(names)), np.zeros(len(names))
        for task, unit in units.items():
            table = np.array([observations[name][task] for name in names])
            differences = table - table.mean(0)
            n_examples = table.shape[1]
            values += unit * differences.mean(1)
            squares = np.full(len(names), (differences**2).mean() / n_examples)
            if n_examples > 1:
                squares = np.maximum(squares, differences.var(1, ddof=1))
            variances += unit**2 * squares / n_examples
        return cls(names, values, variances)


class Expected(NamedTuple):
    """What a plan is expected to score of which a part is measured.

    Attributes:
        value: In the unit of :class:`Measured`, and relative to the same.
        variance: Of its error, beside what is measured in full.
    """

    value: float
    variance: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """How good plans are believed to be.

    Attributes:
        names: The plans.
        values: Of each the objective that is expected on further examples, minus a constant.
        variances: How far it may be off, squared.
    """

    names: tuple[str, ...]
    values: Vector
    variances: Vector

    @classmethod
    def shrunken(
        cls, measured: Measured, typical: Sequence[str], stopped: Sequence[Expected] = ()
    ) -> "Evidence":
        r"""Draw what was measured to what plans usually score.

        For plans whose true values are normal, :math:`N(\mu, \tau^2)`, a measured value y with an
        error of variance v leaves :math:`\mu + \frac{\tau^2}{\tau^2 + v} (y - \mu)` with the
        variance :math:`\frac{\tau^2 v}{\tau^2 + v}`. :math:`\mu` is the mean of typical plans;
        :math:`\tau^2` their variance minus that of their errors, and a part of the latter at
        least. Plans that were stopped early are typical too: without them the usual plan would
        be one that did well.

        Args:
            measured: What was measured.
            typical: The plans that tell what plans usually score, one or more.
            stopped: What others would have been measured at that are as typical.
        """
        chosen = _places(measured.names, typical)
        usual = np.array([*measured.values[chosen], *(expected.value for expected in stopped)])
        # predictions spread less than what is predicted does, by the variance of their errors
        hidden = sum(expected.variance for expected in stopped) / len(usual)
        spread = float(usual.var(ddof=1)) + hidden if len(usual) > 1 else 0.0
        error = float(measured.variances[chosen].mean())
        true_spread = max(spread - error, _LEAST_SPREAD * error, _TINY)
        part = true_spread / (true_spread + measured.variances)
        values = usual.mean() + part * (measured.values - usual.mean())
        return cls(measured.names, values, part * measured.variances)

    def of(self, names: Collection[str]) -> "Evidence":
        """Return what is believed of some of the plans, in the order that they stand in here."""
        wanted = frozenset(names)
        at = [i for i, name in enumerate(self.names) if name in wanted]
        return Evidence(tuple(self.names[i] for i in at), self.values[at], self.variances[at])

    def flattered(self, names: Collection[str]) -> "Evidence":
        """Return the same where what was measured flatters some plans: further examples decide.

        Args:
            names: Plans that were made by looking at the examples that they were measured on.
        """
        is_flattered = np.array([name in names for name in self.names])
        return replace(self, variances=np.where(is_flattered, _UNTOLD, self.variances))

    def and_measured(self, measured: Measured) -> "Evidence":
        """Return what is believed after some of the plans were measured on other examples.

        Both are relative to some mean, and are moved to agree on that of the plans measured now,
        each counted by how well it was known before. Examples that tell none of the plans apart
        change nothing.
        """
        at = _places(self.names, measured.names)
        before, errors = self.values[at], self.variances[at] + _TINY
        if not np.ptp(measured.values) and not measured.variances.any():
            return Evidence(measured.names, before, self.variances[at])
        new = measured.values + np.average(before - measured.values, weights=1 / errors)
        new_errors = measured.variances + _TINY
        weight = errors / (errors + new_errors)
        values = before + weight * (new - before)
        return Evidence(measured.names, values, errors * new_errors / (errors + new_errors))

    @property
    def best(self) -> str:
        """The plan that is believed to be the best; of equal ones the first."""
        return self.names[int(np.argmax(self.values))]

    def ranked(self) -> list[str]:
        """Return the plans, best first."""
        return [self.names[i] for i in np.argsort(-self.values, kind="stable")]


def _places(names: Sequence[str], wanted: Iterable[str]) -> list[int]:
    """Return where names stand among others; there may be thousands."""
    places = {name: i for i, name in enumerate(names)}
    return [places[name] for name in wanted]

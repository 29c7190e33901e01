"""Confirmation: what the winner is worth on examples that no trial has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from searchmerge.search.objective import Objective

Values = Mapping[str, Sequence[float]]
"""Task name to one value per held-out example, or to one value in all."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and the interval around it, both ends included."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The candidates and the references on held-out examples.

    Attributes:
        objective: Plan name to the objective on held-out examples, with its interval.
        winner: The candidate with the highest objective.
        rival: The reference with the highest objective.
        gain: The winner's objective minus the rival's. Its interval has the level asked for
            together over all candidates (Bonferroni), since the winner was chosen among them.
        level: The intervals' level, in (0, 1).
        n_candidates: How many candidates the winner was chosen among.
        single: Tasks of which one number is known, so that it cannot be resampled.
    """

    objective: Mapping[str, Interval]
    winner: str
    rival: str
    gain: Interval
    level: float
    n_candidates: int
    single: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Return one sentence that says whether the winner is better than the best reference."""
        if self.single:
            return (
                f"The found merge differs from the best baseline, {self.rival}, by "
                f"{100 * self.gain.value:+.1f} points. No interval can be given: of "
                f"{', '.join(self.single)} there is one number for all held-out examples."
            )
        gain = f"{100 * self.gain.value:+.1f} points [{100 * self.gain.low:+.1f}, "
        gain += f"{100 * self.gain.high:+.1f}]"
        if self.gain.low > 0:
            return f"The found merge is better than the best baseline, {self.rival}, by {gain}."
        if self.gain.high < 0:
            return f"The found merge is worse than the best baseline, {self.rival}: {gain}."
        return (
            f"The found merge is not distinguishable from the best baseline, {self.rival}: {gain}."
        )


def confirm(  # noqa: PLR0913  (what is compared, and three numbers of the bootstrap)
    values: Mapping[str, Values],
    candidates: Sequence[str],
    objective: Objective,
    own_experts: Mapping[str, str],
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> Confirmation:
    """Compare candidates with references by a paired bootstrap over held-out examples.

    Every resample draws each task's examples anew, the same for all plans, and recomputes the
    own experts' scores that normalise the objective. Intervals are percentile intervals.

    Args:
        values: Plan name to its values; the plans that are no candidates are the references.
        candidates: Names of the plans that the winner is chosen among, one or more.
        objective: What to compare by.
        own_experts: Task name to the plan name of its own expert.
        level: Of the intervals, in (0, 1).
        n_resamples: Bootstrap resamples, 100 or more.
        seed: Seed of the resamples.
    """
    point = _objectives({n: _means(v) for n, v in values.items()}, objective, own_experts)
    resampled = _resample(values, objective, own_experts, n_resamples, seed)
    winner = max(candidates, key=lambda name: point[name])
    references = [name for name in values if name not in candidates]
    rival = max(references, key=lambda name: point[name])
    corrected = 1 - (1 - level) / len(candidates)
    gains = resampled[winner] - resampled[rival]
    return Confirmation(
        {name: _interval(point[name], resampled[name], level) for name in values},
        winner,
        rival,
        _interval(point[winner] - point[rival], gains, corrected),
        level,
        len(candidates),
        tuple(task for task, own in values[winner].items() if len(own) < 2),
    )


def _means(values: Values) -> dict[str, float]:
    return {task: float(np.mean(own)) for task, own in values.items()}


def _objectives(
    scores: Mapping[str, Mapping[str, float]], objective: Objective, own: Mapping[str, str]
) -> dict[str, float]:
    references = {task: scores[name][task] for task, name in own.items()}
    if objective.needs_references and not all(references.values()):
        references = {task: score or 1.0 for task, score in references.items()}
    here = replace(objective, references=references, constraints=())
    return {name: here.scalar(own_scores) for name, own_scores in scores.items()}


def _resample(
    values: Mapping[str, Values],
    objective: Objective,
    own: Mapping[str, str],
    n_resamples: int,
    seed: int,
) -> dict[str, npt.NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    means: dict[str, dict[str, npt.NDArray[np.float64]]] = {name: {} for name in values}
    for task in objective.goals:
        n_examples = len(next(iter(values.values()))[task])
        counts = generator.multinomial(n_examples, [1 / n_examples] * n_examples, n_resamples)
        for name, own_values in values.items():
            means[name][task] = counts @ np.asarray(own_values[task], dtype=float) / n_examples
    drawn = [
        _objectives(
            {n: {t: float(m[i]) for t, m in own_means.items()} for n, own_means in means.items()},
            objective,
            own,
        )
        for i in range(n_resamples)
    ]
    return {name: np.array([one[name] for one in drawn]) for name in values}


def _interval(value: float, resampled: npt.NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))

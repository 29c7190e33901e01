"""Confirmation: what the winner is worth on examples that no trial has seen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from searchmerge.evaluators.score_kind import Counts, ScoreKind
from searchmerge.search.objective import Objective

Values = Mapping[str, Sequence[float]]
"""Task name to what its held-out examples gave, as its kind of score says."""


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
        best_reference: The reference with the highest objective.
        gain: The winner's objective minus that reference's. Its interval has the level asked for
            together over all candidates (Bonferroni), since the winner was chosen among them.
        level: The intervals' level, in (0, 1).
        n_candidates: How many candidates the winner was chosen among.
        single: Tasks of which one number is known, so that it cannot be resampled.
    """

    objective: Mapping[str, Interval]
    winner: str
    best_reference: str
    gain: Interval
    level: float
    n_candidates: int
    single: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Return one sentence that says whether the winner is better than the best reference."""
        reference, gain = self.best_reference, self.gain
        points = f"{100 * gain.value:+.1f} points"
        if self.single:
            return (
                f"The found merge differs from the best baseline, {reference}, by {points}. No "
                f"interval can be given: of {', '.join(self.single)} there is one number for all "
                "held-out examples."
            )
        points += f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        if gain.low > 0:
            return f"The found merge is better than the best baseline, {reference}, by {points}."
        if gain.high < 0:
            return f"The found merge is worse than the best baseline, {reference}: {points}."
        return (
            "The found merge is not distinguishable from the best baseline, "
            f"{reference}: {points}."
        )


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How held-out examples are resampled.

    Attributes:
        level: Of the intervals, in (0, 1).
        n_resamples: How many resamples, 100 or more.
        seed: Seed of the resamples.
    """

    level: float
    n_resamples: int
    seed: int


def confirm(
    values: Mapping[str, Values],
    candidates: Sequence[str],
    kinds: Mapping[str, ScoreKind],
    objective: Objective,
    experts: Mapping[str, str],
    bootstrap: Bootstrap,
) -> Confirmation:
    """Compare candidates with references by a paired bootstrap over held-out examples.

    Every resample draws each task's examples anew, the same for all plans, and recomputes the
    own experts' scores that normalise the objective. Intervals are percentile intervals.

    Args:
        values: Plan name to its values; the plans that are no candidates are the references.
        candidates: Names of the plans that the winner is chosen among, one or more.
        kinds: Task name to how its score comes from values.
        objective: What to compare by.
        experts: Task name to the plan name of its own expert.
        bootstrap: How examples are resampled.
    """
    scores = {
        name: {task: kinds[task].score(task_values) for task, task_values in plan.items()}
        for name, plan in values.items()
    }
    point = _objectives(scores, objective, experts)
    resamples = [
        _objectives(drawn, objective, experts)
        for drawn in _resampled(values, kinds, objective, bootstrap)
    ]
    resampled = {name: np.array([drawn[name] for drawn in resamples]) for name in values}
    winner = max(candidates, key=lambda name: point[name])
    references = [name for name in values if name not in candidates]
    best_reference = max(references, key=lambda name: point[name])
    corrected = 1 - (1 - bootstrap.level) / len(candidates)
    gains = resampled[winner] - resampled[best_reference]
    return Confirmation(
        {name: _interval(point[name], resampled[name], bootstrap.level) for name in values},
        winner,
        best_reference,
        _interval(point[winner] - point[best_reference], gains, corrected),
        bootstrap.level,
        len(candidates),
        tuple(task for task, task_values in values[winner].items() if len(task_values) < 2),
    )


def _objectives(
    scores: Mapping[str, Mapping[str, float]], objective: Objective, experts: Mapping[str, str]
) -> dict[str, float]:
    expert_scores = {task: scores[name][task] for task, name in experts.items()}
    if objective.needs_experts and not all(expert_scores.values()):
        expert_scores = {task: score or 1.0 for task, score in expert_scores.items()}
    drawn = replace(objective, expert_scores=expert_scores, constraints=())
    return {name: drawn.scalar(plan_scores) for name, plan_scores in scores.items()}


def _resampled(
    values: Mapping[str, Values],
    kinds: Mapping[str, ScoreKind],
    objective: Objective,
    bootstrap: Bootstrap,
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield every plan's task scores on each resample of the examples."""
    generator = np.random.default_rng(bootstrap.seed)
    resampled: dict[str, dict[str, list[float]]] = {name: {} for name in values}
    for task in objective.goals:
        n_values = len(next(iter(values.values()))[task])
        counts: Counts = generator.multinomial(
            n_values, [1 / n_values] * n_values, bootstrap.n_resamples
        )
        for name, plan in values.items():
            resampled[name][task] = kinds[task].resampled(plan[task], counts)
    for i in range(bootstrap.n_resamples):
        yield {
            name: {task: scores[i] for task, scores in plan.items()}
            for name, plan in resampled.items()
        }


def _interval(value: float, resampled: npt.NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))

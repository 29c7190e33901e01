"""Confirmation: what the winner is worth on examples that no trial has seen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from searchmerge.evaluators.evaluator import Aggregate
from searchmerge.search.objective import Objective
from searchmerge.search.schedule import score_of

Values = Mapping[str, Sequence[float]]
"""Task name to one value, or record, per held-out example, or to the one score of all."""


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
    aggregates: Mapping[str, Aggregate] | None = None,
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
        aggregates: Task name to what makes its score from records, where that is no mean.
    """
    makes = aggregates or {}
    scores = {
        name: {task: score_of(own, makes.get(task)) for task, own in plan.items()}
        for name, plan in values.items()
    }
    point = _objectives(scores, objective, own_experts)
    drawn = _resample(values, objective, makes, n_resamples, seed)
    resamples = [_objectives(one, objective, own_experts) for one in drawn]
    resampled = {name: np.array([one[name] for one in resamples]) for name in values}
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
        tuple(
            task for task in values[winner] if any(len(own[task]) < 2 for own in values.values())
        ),
    )


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
    aggregates: Mapping[str, Aggregate],
    n_resamples: int,
    seed: int,
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield every plan's task scores on each resample of the examples."""
    generator = np.random.default_rng(seed)
    found: dict[str, dict[str, Sequence[float]]] = {name: {} for name in values}
    for task in objective.goals:
        n_examples = max(len(own[task]) for own in values.values())
        counts = generator.multinomial(n_examples, [1 / n_examples] * n_examples, n_resamples)
        for name, own in values.items():
            found[name][task] = _on_resamples(own[task], counts, aggregates.get(task))
    for i in range(n_resamples):
        yield {n: {task: float(own[i]) for task, own in plan.items()} for n, plan in found.items()}


def _on_resamples(
    values: Sequence[float], counts: npt.NDArray[np.int64], aggregate: Aggregate | None
) -> Sequence[float]:
    """Return a task's score on each resample; ``counts`` says how often an example is in it."""
    if len(values) < 2:  # the score itself, which stays what it is
        return [values[0]] * len(counts)
    if aggregate is None:
        means: list[float] = (counts @ np.asarray(values, dtype=float) / len(values)).tolist()
        return means
    return [aggregate(np.repeat(values, own).tolist()) for own in counts]


def _interval(value: float, resampled: npt.NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))

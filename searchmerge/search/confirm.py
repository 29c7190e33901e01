"""Confirmation: what the best plans are worth on examples that no trial has seen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from searchmerge.evaluators.score_kind import Counts, ScoreKind
from searchmerge.search.objective import Objective
from searchmerge.search.resolution import REALISTIC

_TOLD_APART = 0.01  # of the objective

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
        objective: Plan name to the objective on held-out examples, with its interval, of those
            that were scored on all tasks.
        winner: The plan with the best evidence, found or published: the one that is saved.
        best_found: The candidate with the best evidence; empty where there is none.
        best_reference: The reference with the best evidence.
        gain: The best candidate's objective minus that reference's. Its interval has the level
            asked for together over all candidates (Bonferroni), since one was chosen of them.
            ``None`` where there is none.
        lead: Every other plan's name to the winner's objective minus that plan's. An interval is
            that of one comparison, at the level asked for.
        level: The intervals' level, in (0, 1).
        n_candidates: How many candidates it was chosen among.
        n_examples: Held-out examples of each task, on average.
        single: Tasks of which one number is known, so that it cannot be resampled.
        broken: Plan name to the constraints that it breaks on what trials see.
        absent: Why there is no candidate, where there is none.
    """

    objective: Mapping[str, Interval]
    winner: str
    best_found: str
    best_reference: str
    gain: Interval | None
    lead: Mapping[str, Interval]
    level: float
    n_candidates: int
    n_examples: int
    single: tuple[str, ...] = ()
    broken: Mapping[str, Sequence[str]] = field(default_factory=dict)
    absent: str = ""

    @property
    def verdict(self) -> str:
        """Return which plan is saved, how found and published ones compare, what may help."""
        breaks = ""
        if broken := self.broken.get(self.winner):
            breaks = f", though it breaks {', '.join(broken)}: no plan keeps every constraint"
        return f"Saved is {self.winner}{breaks}. {self._found(self.gain)}"

    def _found(self, gain: Interval | None) -> str:
        """Return what the search found beside the best reference, and what may help."""
        if gain is None:
            return (
                f"Nothing that the search found is compared with it: {self.absent}. The same "
                "`searchmerge run` goes on from here; raise search.n_trials or search.timeout "
                "where they are used up."
            )
        return f"{self._comparison(gain)}{self._advice(gain)}"

    @property
    def breaking(self) -> tuple[str, ...]:
        """The plans that break a constraint though what is saved breaks none."""
        return tuple(name for name in self.broken if self._breaks_more(name))

    def _breaks_more(self, name: str) -> bool:
        """Return whether a plan breaks a constraint though what is saved breaks none."""
        return bool(self.broken.get(name)) and not self.broken.get(self.winner)

    def _called(self, name: str) -> str:
        """Return what a plan is called, and that it cannot be saved where that is so."""
        return f"{name} (which breaks a constraint)" if self._breaks_more(name) else name

    def _comparison(self, gain: Interval) -> str:
        """Return whether the best found merge is better than the best reference."""
        found, reference = self._called(self.best_found), self._called(self.best_reference)
        points = f"{100 * gain.value:+.1f} points"
        if self.single:
            return (
                f"The best found merge, {found}, differs from the best baseline, {reference}, by "
                f"{points}. No interval can be given: of {', '.join(self.single)} there is one "
                "number for all held-out examples."
            )
        points += f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        which = "is not distinguishable from"
        if gain.low > 0:
            which = "is better than"
        elif gain.high < 0:
            which = "is worse than"
        return (
            f"The best found merge, {found}, {which} the best baseline, {reference}, on held-out "
            f"examples: {points}."
        )

    def _advice(self, gain: Interval) -> str:
        """Return what may lead to a better merge, where none was found."""
        if not self.single and all(lead.low == lead.high == 0 for lead in self.lead.values()):
            return (
                " All plans score the same on held-out examples, so that these tell nothing of "
                "them; see how the tasks are scored."
            )
        if self.winner == self.best_found:
            return ""
        if self._breaks_more(self.best_found):
            return " Nothing found keeps all constraints; more trials or another space may help."
        return (
            " What the search found has not enough evidence to be saved in its place: give it "
            f"more examples (select), more trials, or another space{self._examples_needed(gain)}."
        )

    def _examples_needed(self, gain: Interval) -> str:
        """Return how many examples tell close merges apart; nothing where these do."""
        half = (gain.high - gain.low) / 2
        if self.single or half <= _TOLD_APART:
            return ""
        n_needed = math.ceil(self.n_examples * (half / _TOLD_APART) ** 2 / 10) * 10
        if n_needed > REALISTIC:
            return (
                f"; by what is held out here, merges that differ by {100 * _TOLD_APART:.0f} point "
                "cannot be told apart with any realistic number of examples"
            )
        return (
            f"; about {n_needed} examples of each task, to select and held out, tell merges "
            f"apart that differ by {100 * _TOLD_APART:.0f} point"
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


@dataclass(frozen=True, slots=True)
class Contest:
    """What is known of plans before they are compared.

    Attributes:
        candidates: Those that the search found; the others, one or more, are the references.
        ranked: All, by what they break of constraints and by their evidence, best first.
        broken: Plan name to the constraints that it breaks on what trials see.
        absent: Why there is no candidate, where there is none.
    """

    candidates: Sequence[str]
    ranked: Sequence[str]
    broken: Mapping[str, Sequence[str]] = field(default_factory=dict)
    absent: str = ""


def confirm(
    values: Mapping[str, Values],
    contest: Contest,
    kinds: Mapping[str, ScoreKind],
    objective: Objective,
    experts: Mapping[str, str],
    bootstrap: Bootstrap,
) -> Confirmation:
    """Compare candidates with references by a paired bootstrap over held-out examples.

    Every resample draws each task's examples anew, the same for all plans, and recomputes the
    own experts' scores that normalise the objective: one of 0 stays what it is on all held-out
    examples, or on what trials see where it is 0 there too. Intervals are percentile intervals.

    Args:
        values: Plan name to its values; the plans that are no candidates are the references.
            Those that have values of some tasks alone are compared with none.
        contest: What is known of the plans before.
        kinds: Task name to how its score comes from values.
        objective: What to compare by, relative to what trials see.
        experts: Task name to the plan name of its own expert, which may be none of them.
        bootstrap: How examples are resampled.
    """
    scores = {
        name: {task: kinds[task].score(task_values) for task, task_values in plan.items()}
        for name, plan in values.items()
    }
    held_out = _relative_to(scores, objective, experts)
    point = _objectives(scores, held_out)
    resamples = [
        _objectives(drawn, _relative_to(drawn, held_out, experts))
        for drawn in _resampled(values, kinds, objective, bootstrap)
    ]
    resampled = {name: np.array([drawn[name] for drawn in resamples]) for name in point}
    candidates = contest.candidates
    ranked = [*contest.ranked, *(name for name in point if name not in contest.ranked)]
    best_found = next((name for name in ranked if name in candidates), "")
    best_reference = next(name for name in ranked if name not in candidates)
    corrected = 1 - (1 - bootstrap.level) / max(1, len(candidates))
    winner = ranked[0]

    def ahead(name: str, other: str, level: float) -> Interval:
        return _interval(point[name] - point[other], resampled[name] - resampled[other], level)

    n_values = {task: len(task_values) for task, task_values in values[winner].items()}
    return Confirmation(
        {name: _interval(point[name], resampled[name], bootstrap.level) for name in point},
        winner,
        best_found,
        best_reference,
        ahead(best_found, best_reference, corrected) if best_found else None,
        {name: ahead(winner, name, bootstrap.level) for name in point if name != winner},
        bootstrap.level,
        len(candidates),
        round(sum(n_values.values()) / len(n_values)),
        tuple(task for task, n in n_values.items() if n < 2),
        contest.broken,
        contest.absent,
    )


def _objectives(
    scores: Mapping[str, Mapping[str, float]], objective: Objective
) -> dict[str, float]:
    """Return the objective of each plan that has a score of every task."""
    return {
        name: objective.scalar(by_task)
        for name, by_task in scores.items()
        if by_task.keys() >= objective.goals.keys()
    }


def _relative_to(
    scores: Mapping[str, Mapping[str, float]], objective: Objective, experts: Mapping[str, str]
) -> Objective:
    """Return the objective relative to what the own experts score, without constraints."""
    known = {
        task: scores[name][task] for task, name in experts.items() if task in scores.get(name, {})
    }
    return replace(objective.on_other_examples(known, {}), constraints=())


def _resampled(
    values: Mapping[str, Values],
    kinds: Mapping[str, ScoreKind],
    objective: Objective,
    bootstrap: Bootstrap,
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield every plan's task scores, of the tasks it has, on each resample of the examples."""
    generator = np.random.default_rng(bootstrap.seed)
    resampled: dict[str, dict[str, list[float]]] = {name: {} for name in values}
    for task in objective.goals:
        having = {name: plan[task] for name, plan in values.items() if task in plan}
        n_values = len(next(iter(having.values())))
        counts: Counts = generator.multinomial(
            n_values, [1 / n_values] * n_values, bootstrap.n_resamples
        )
        for name, its in having.items():
            resampled[name][task] = kinds[task].resampled(its, counts)
    for i in range(bootstrap.n_resamples):
        yield {
            name: {task: scores[i] for task, scores in plan.items()}
            for name, plan in resampled.items()
        }


def _interval(value: float, resampled: npt.NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))

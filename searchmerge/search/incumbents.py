"""The incumbents of a study: what its candidates are compared with while they are scored."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Round
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.pick import Contender, best_on_select, plan_scores
from searchmerge.search.racing import (
    Incumbent,
    PlanScores,
    Racing,
    incumbent_of,
    n_seen,
    predict,
)
from searchmerge.search.references import BASE, is_merge, merges
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord, best_of, front_with

_POOL = 64  # as many of the latest plans tell how plans differ
_LEARNT_AT = (2, 4, 8, 16, 32, 64, 128)
"""At so many trials scored in full it is learnt anew how to read grades: where racing works those
are few, and a candidate that is stopped is not read again."""


class Outcome(NamedTuple):
    """What came of a candidate.

    Attributes:
        scores: Task name to its score; where it was stopped early the one predicted.
        estimates: What the scores are taken for, read with how clearly examples were answered.
        se: Standard error of the objective beside the best plan's; ``None`` where there is none.
        stopped_after: Blocks that it was scored on where it was stopped early, else ``None``.
    """

    scores: dict[str, float]
    estimates: dict[str, float]
    se: float | None
    stopped_after: int | None


class Incumbents:
    """What candidates are compared with: the best plan so far, or all plans of the front.

    Args:
        board: What plans score; candidates are compared on its ``select`` part.
        objective: What to maximise.
        racing: Stops candidates that will not win; ``None`` scores all in full.
        references: Name to plan of what competes with the candidates; the merges of them tell
            how plans differ, until enough candidates do.
        seed: Of the halves of the examples by which it is learnt what grades tell; ``None``
            goes by the metric alone.
    """

    def __init__(
        self,
        board: Scoreboard,
        objective: Objective,
        racing: Racing | None = None,
        *,
        references: Mapping[str, MergePlan] | None = None,
        seed: int | None = None,
    ) -> None:
        self._board = board
        self._objective = objective
        self._racing = racing
        self._seed = seed
        self._places = board.schedule.places("select")
        self._published = {
            name: plan
            for name, plan in (references or {}).items()
            if board.is_full(plan, "select")
        }
        self._pool = merges(self._published)
        self._full: list[TrialRecord] = []  # all trials that were scored in full, as last read
        self._read: tuple[TrialRecord, ...] = ()
        self._read_anew()

    def _read_anew(self) -> None:
        """Learn how to read grades from all that was scored in full, and read that so."""
        if self._seed is not None:
            plans = [*self._pool, *(record.plan for record in self._full)]
            extremes = [plan for plan in self._published.values() if plan not in self._pool]
            grader = self._board.learn(plans, self._seed, extremes)
            self._board = self._board.read_by(grader)
        self._contenders = {
            name: Contender.of(self._board, plan, self._objective)
            for name, plan in self._published.items()
        }
        self._leader: str | None = None
        self._digests = {plan.digest for plan in self._published.values()}
        self._base = self._contenders[BASE].scored if BASE in self._contenders else None
        self._references = [its.scored for name, its in self._contenders.items() if is_merge(name)]
        self._latest: list[PlanScores] = []
        self._best: TrialRecord | None = None
        self._front: list[TrialRecord] = []
        self._scores: dict[int, PlanScores] = {}  # of the best and the front, by trial number
        self._paired: dict[int, Incumbent] = {}  # by the identity of their scores
        for i, record in enumerate(self._full):
            scores = plan_scores(self._board, record.plan, "select")
            self._full[i] = record.judged(self._objective, record.scores, scores.scores)
            self._compare(self._full[i], scores)
        self._read = tuple(self._full)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial that was scored in full; ``None`` where there is none yet."""
        return self._best

    @property
    def leader(self) -> tuple[str, MergePlan] | None:
        """The name and the plan with the best evidence, published or found.

        That is what would be saved if the search ended now and nothing were held out. ``None``
        while no merge is scored.
        """
        if self._leader is None:  # else nothing was scored in full since
            tasks = self._board.schedule.tasks
            self._leader = best_on_select(
                self._contenders, self._published, tasks, self._objective
            )
        name = self._leader
        return None if name is None else (name, self._contenders[name].plan)

    @property
    def read(self) -> tuple[TrialRecord, ...]:
        """The trials that were read anew when it was last learnt how to, as they are read now."""
        return self._read

    def enter(self, record: TrialRecord) -> bool:
        """Take in a trial that was scored in full; return whether it is the best so far."""
        self._full.append(record)
        is_best = self._compare(record, plan_scores(self._board, record.plan, "select"))
        if self._seed is not None and len(self._full) in _LEARNT_AT:
            self._read_anew()
        return is_best

    def _compare(self, record: TrialRecord, scores: PlanScores) -> bool:
        """Let a trial be the best or on the front, if it is; return whether it is the best."""
        self._latest = [*self._latest[-_POOL:], scores]
        if record.plan.digest not in self._digests:
            self._digests.add(record.plan.digest)
            contender = Contender(record.plan, scores, record.standing.kept)
            self._contenders[record.name] = contender
            self._leader = None
        before = [self._best] if self._best else []
        self._front = front_with(self._front, record)
        [self._best] = best_of(self._front or [*before, record], 1)
        candidates = {**self._scores, record.number: scores}
        self._scores = {r.number: candidates[r.number] for r in (self._best, *self._front)}
        self._paired.clear()
        return self._best is record

    def rounds(self) -> Sequence[Round]:
        """Return the rounds in the order that tells soonest whether a candidate may win."""
        rounds = self._board.schedule.rounds["select"]
        if self._racing is None or self._best is None:
            return rounds
        expected = {}
        for task, squares in self._pair(self._scores[self._best.number]).prior.squares.items():
            unit = (self._objective.unit(task) / len(squares)) ** 2
            for key, place in self._places[task].items():
                expected[key] = unit * float(squares[place].sum())
        return sorted(rounds, key=lambda blocks: -sum(expected[block.key] for block in blocks))

    def may_win(self, plan: MergePlan, *, is_refined: bool = False) -> bool:
        """Return whether a candidate may still win.

        Args:
            plan: The candidate.
            is_refined: Whether it was refined. Then it differs from the best plan in other ways
                than those do by which the rest of its score is predicted, and a collapse alone
                stops it.
        """
        if self._racing is None:
            return True
        against = self._front or ([self._best] if self._best else [])
        if is_refined:
            against = []
        return not self._racing.stops(
            self._objective,
            self._places,
            self._board.seen(plan),
            [self._pair(self._scores[record.number]) for record in against],
            self._pair(self._base) if self._base else None,
        )

    def outcome(self, plan: MergePlan) -> Outcome:
        """Return what came of a plan that is done with.

        Raises:
            StudyError: If it was stopped early and there is nothing to pair it with.
        """
        best = self._scores[self._best.number] if self._best else self._base
        if self._board.is_full(plan, "select"):
            estimates = plan_scores(self._board, plan, "select")
            return Outcome(
                self._board.scores(plan, "select"),
                dict(estimates.scores),
                self._paired_error(estimates, best),
                None,
            )
        if best is None:
            raise StudyError("a trial was stopped early though nothing was scored in full")
        observed = self._board.seen(plan)
        predicted = predict(self._places, observed, self._pair(best))
        scores = {**best.scores, **predicted.scores}
        units = np.array([self._objective.unit(task) for task in predicted.scores])
        se = math.sqrt(max(0.0, float(units @ predicted.covariance @ units)))
        clipped = {task: self._within(task, score) for task, score in scores.items()}
        return Outcome(clipped, scores, se, n_seen(self._places, observed))

    def _within(self, task: str, score: float) -> float:
        """Return a predicted score, in [0, 1] where all that plans scored lies there."""
        blocks = self._board.schedule.blocks["select"][task]
        plans = [*self._pool, *(record.plan for record in self._full)]
        seen = [v for plan in plans for v in self._board.store.task_values(plan, blocks)]
        if seen and all(0 <= value <= 1 for value in seen):
            return min(1.0, max(0.0, score))
        return score

    def _paired_error(self, plan: PlanScores, best: PlanScores | None) -> float | None:
        """Return the standard error of a plan's objective beside the best one's."""
        if best is None:
            return None
        variance = 0.0
        for task, values in plan.values.items():
            if len(values) < 2:
                return None
            differences = values - best.values[task]
            unit = self._objective.unit(task)
            variance += unit**2 * float(differences.var(ddof=1)) / len(values)
        return math.sqrt(variance)

    def _pair(self, scores: PlanScores) -> Incumbent:
        if id(scores) not in self._paired:
            pool = [*self._references, *self._latest]
            self._paired[id(scores)] = incumbent_of(scores, pool)
        return self._paired[id(scores)]

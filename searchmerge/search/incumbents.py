"""The incumbents of a study: what its candidates are compared with while they are scored."""

from collections.abc import Iterable, Sequence

import numpy as np

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Round
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.racing import (
    Incumbent,
    PlanScores,
    Racing,
    incumbent_of,
    n_seen,
    predict,
)
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord, best_of, front_with

_POOL = 64  # as many of the latest plans tell how plans differ


class Incumbents:
    """What candidates are compared with: the best plan so far, or all plans of the front.

    Args:
        board: What plans score; candidates are compared on its ``select`` part.
        objective: What to maximise.
        racing: Stops candidates that will not win; ``None`` scores all in full.
        base: The base model's plan.
        pool: Plans that tell how plans differ, until enough candidates do.
    """

    def __init__(
        self,
        board: Scoreboard,
        objective: Objective,
        racing: Racing | None = None,
        *,
        base: MergePlan | None = None,
        pool: Iterable[MergePlan] = (),
    ) -> None:
        self._board = board
        self._objective = objective
        self._racing = racing
        self._places = board.schedule.places("select")
        self._base = next(iter(self._in_full([base] if base else [])), None)
        self._references = self._in_full(pool)
        self._latest: list[PlanScores] = []
        self._best: TrialRecord | None = None
        self._front: list[TrialRecord] = []
        self._scores: dict[int, PlanScores] = {}  # of the best and the front, by trial number
        self._paired: dict[int, Incumbent] = {}  # by the identity of their scores

    @property
    def best(self) -> TrialRecord | None:
        """The best trial that was scored in full; ``None`` where there is none yet."""
        return self._best

    def enter(self, record: TrialRecord) -> bool:
        """Take in a trial that was scored in full; return whether it is the best so far."""
        scores = self._plan_scores(record.plan)
        self._latest = [*self._latest[-_POOL:], scores]
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

    def may_win(self, plan: MergePlan) -> bool:
        """Return whether a candidate may still win."""
        if self._racing is None:
            return True
        against = self._front or ([self._best] if self._best else [])
        return not self._racing.stops(
            self._objective,
            self._places,
            self._board.observed(plan),
            [self._pair(self._scores[record.number]) for record in against],
            self._pair(self._base) if self._base else None,
        )

    def outcome(self, plan: MergePlan) -> tuple[dict[str, float], int | None]:
        """Return the task scores of a plan that is done with, and when it was stopped.

        Returns:
            The scores that it has, and ``None``; where it was stopped early those expected of
            it, and on how many blocks they rest.

        Raises:
            StudyError: If it was stopped early and there is nothing to pair it with.
        """
        if self._board.is_full(plan, "select"):
            return self._board.scores(plan, "select"), None
        best = self._scores[self._best.number] if self._best else self._base
        if best is None:
            raise StudyError("a trial was stopped early though nothing was scored in full")
        observed = self._board.observed(plan)
        predicted = predict(self._places, observed, self._pair(best))
        return {**best.scores, **predicted.scores}, n_seen(self._places, observed)

    def _pair(self, scores: PlanScores) -> Incumbent:
        if id(scores) not in self._paired:
            pool = [*self._references, *self._latest]
            self._paired[id(scores)] = incumbent_of(scores, pool)
        return self._paired[id(scores)]

    def _in_full(self, plans: Iterable[MergePlan]) -> list[PlanScores]:
        return [self._plan_scores(p) for p in plans if self._board.is_full(p, "select")]

    def _plan_scores(self, plan: MergePlan) -> PlanScores:
        observed = self._board.observed(plan)
        values = {
            task: np.array([value for key in blocks for value in observed[key]])
            for task, blocks in self._places.items()
        }
        return PlanScores(self._board.scores(plan, "select"), values)

"""The incumbents of a study: what its candidates are compared with while they are scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Round
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.pick import Contender, best_on_select, plan_scores, reference_records
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
from searchmerge.search.trials import TrialRecord, best_of, front_with, ranked

_POOL = 64  # as many of the latest plans tell how plans differ
_LEARNT_AT = tuple(2**i for i in range(1, 16))
"""At so many trials it is learnt anew how to read grades, and how far predictions are off."""


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
    """What candidates are compared with: the best plan known, or all plans of the front.

    Published settings are among those: a candidate that will not be better than the best of them
    will not be saved either.

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
        self._stopped: dict[str, TrialRecord] = {}  # by plan, as last predicted
        self._n_told = 0  # plans of trials that are not published
        # task to whether all that was scored in full lies in [0, 1]
        self._is_bounded = dict.fromkeys(self._places, True)
        for plan in self._pool:
            self._see(plan)
        self._base: PlanScores | None = None
        self._read: tuple[TrialRecord, ...] = ()
        self.read_anew()

    def read_anew(self) -> None:
        """Learn how to read grades from all that was scored, and read what is full so."""
        if self._seed is not None:
            plans = [*self._pool, *(r.plan for r in (*self._full, *self.stopped))]
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
        self._found = _Top()  # of the trials that were scored in full
        self._known = _Top()  # of these and what is published
        self._paired: dict[int, Incumbent] = {}  # by the identity of their scores
        published = reference_records(self._board, self._published, self._objective)
        for name, record in published.items():
            self._known.enter(record, self._contenders[name].scored)
        for i, record in enumerate(self._full):
            read = plan_scores(self._board, record.plan, "select")
            self._full[i] = record.judged(self._objective, record.scores, read.scores)
            self._compare(self._full[i], read)
        self._read = tuple(self._full)
        self._spread = 1.0  # of predictions
        best = self._known.best_scores
        if self._racing is not None and best is not None:
            units = {t: self._objective.unit(t) / len(its) for t, its in best.values.items()}
            self._spread = self._pair(best).prior.found_spread(units)
            self._paired.clear()

    @property
    def best(self) -> TrialRecord | None:
        """The best trial that was scored in full; ``None`` where there is none yet."""
        return self._found.best

    @property
    def leader(self) -> tuple[str, MergePlan] | None:
        """The name and the plan with the best evidence, published or found.

        That is what would be saved if the search ended now and nothing were held out. ``None``
        while no merge is scored.
        """
        if self._leader is None:  # else no plan was told since
            tasks = self._board.schedule.tasks
            self._leader = best_on_select(
                self._contenders, self._published, tasks, self._objective, self.stopped
            )
        name = self._leader
        return None if name is None else (name, self._contenders[name].plan)

    @property
    def read(self) -> tuple[TrialRecord, ...]:
        """The trials that were read anew when it was last learnt how to, as they are read now."""
        return self._read

    @property
    def stopped(self) -> list[TrialRecord]:
        """The trials that were stopped early, as they were predicted; not those below the base.

        What is worse than the base is not like the plans that are to be told apart.
        """
        least = -math.inf if self._base is None else self._objective.scalar(self._base.scores)
        return [r for r in self._stopped.values() if r.value is not None and r.value >= least]

    def predict_anew(self) -> list[TrialRecord]:
        """Predict the plans that were stopped early as all is read now; return them, best first.

        What was learnt since may let one win that could not: see :meth:`may_win`.
        """
        for digest, record in self._stopped.items():
            outcome = self.outcome(record.plan)
            n_blocks = outcome.stopped_after or record.stopped_after
            record = record.judged(self._objective, outcome.scores, outcome.estimates)
            self._stopped[digest] = replace(record, se=outcome.se, stopped_after=n_blocks)
        return ranked(self._stopped.values())

    def enter(self, record: TrialRecord) -> bool:
        """Take in a trial that has a score; return whether it is the best so far.

        One that was stopped early is none, and may come again once it is scored in full.
        """
        digest = record.plan.digest
        is_new = self._stopped.pop(digest, None) is None and digest not in self._digests
        is_best = False
        if record.is_full:
            self._full.append(record)
            self._see(record.plan)
            is_best = self._compare(record, plan_scores(self._board, record.plan, "select"))
        elif digest not in self._digests:
            self._stopped[digest] = record
            self._leader = None
        self._n_told += is_new
        if is_new and self._n_told in _LEARNT_AT:
            self.read_anew()
        return is_best

    def _see(self, plan: MergePlan) -> None:
        """Take note of the range of what a plan scored in full."""
        for task, blocks in self._board.schedule.blocks["select"].items():
            if self._is_bounded[task]:
                values = self._board.store.task_values(plan, blocks)
                self._is_bounded[task] = all(0 <= value <= 1 for value in values)

    def _compare(self, record: TrialRecord, scores: PlanScores) -> bool:
        """Let a trial be the best or on the front, if it is; return whether it is the best."""
        if record.plan.digest not in self._digests:
            self._digests.add(record.plan.digest)
            contender = Contender(record.plan, scores, record.standing.kept)
            self._contenders[record.name] = contender
            self._latest = [*self._latest[-_POOL:], scores]
            self._leader = None
        self._known.enter(record, scores)
        self._paired.clear()
        return self._found.enter(record, scores)

    def rounds(self) -> Sequence[Round]:
        """Return the rounds in the order that tells soonest whether a candidate may win."""
        rounds = self._board.schedule.rounds["select"]
        best = self._known.best_scores
        if self._racing is None or best is None:
            return rounds
        expected = {}
        for task, squares in self._pair(best).prior.squares.items():
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
        against = [] if is_refined else self._known.front_scores
        return not self._racing.stops(
            self._objective,
            self._places,
            self._board.seen(plan),
            [self._pair(scores) for scores in against],
            self._pair(self._base) if self._base else None,
        )

    def outcome(self, plan: MergePlan) -> Outcome:
        """Return what came of a plan that is done with.

        Raises:
            StudyError: If it was stopped early and there is nothing to pair it with.
        """
        best = self._known.best_scores or self._base
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
        is_any_full = bool(self._pool or self._full)
        return min(1.0, max(0.0, score)) if is_any_full and self._is_bounded[task] else score

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
            self._paired[id(scores)] = incumbent_of(scores, pool, self._spread)
        return self._paired[id(scores)]


class _Top:
    """The best of some plans that were scored in full, and with several objectives the front."""

    def __init__(self) -> None:
        self.best: TrialRecord | None = None
        self._front: list[TrialRecord] = []
        self._scores: dict[int, PlanScores] = {}  # of the best and the front, by trial number

    def enter(self, record: TrialRecord, scores: PlanScores) -> bool:
        """Let a plan be the best or on the front, if it is; return whether it is the best."""
        before = [self.best] if self.best else []
        self._front = front_with(self._front, record)
        [self.best] = best_of(self._front or [*before, record], 1)
        candidates = {**self._scores, record.number: scores}
        self._scores = {r.number: candidates[r.number] for r in (self.best, *self._front)}
        return self.best is record

    @property
    def best_scores(self) -> PlanScores | None:
        """What the best scored; ``None`` where there is none."""
        return self._scores[self.best.number] if self.best else None

    @property
    def front_scores(self) -> list[PlanScores]:
        """What the plans of the front scored; with one objective the best."""
        shown = self._front or ([self.best] if self.best else [])
        return [self._scores[record.number] for record in shown]

"""What a study's candidates are compared with while they are scored."""

from collections.abc import Iterable, Sequence

import numpy as np

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Round
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.racing import Outlook, Racing, Rival, outlook_of, predict
from searchmerge.search.schedule import Schedule
from searchmerge.search.scores import ScoreStore

_POOL = 64  # as many of the latest plans tell how plans differ


class Contest:
    """What candidates are compared with: the best plan so far, or all plans of the front.

    Args:
        scores: All that was scored.
        schedule: What candidates are scored on; the contest is over its ``select`` part.
        objective: What to maximise.
        racing: Stops candidates that will not win; ``None`` scores all in full.
        base: The base model's plan.
        pool: Plans that tell how plans differ, until enough candidates do.
    """

    def __init__(
        self,
        scores: ScoreStore,
        schedule: Schedule,
        objective: Objective,
        racing: Racing | None = None,
        *,
        base: MergePlan | None = None,
        pool: Iterable[MergePlan] = (),
    ) -> None:
        self.objective = objective
        self._scores = scores
        self._schedule = schedule
        self._racing = racing
        self._base = next(iter(self._known_rivals([base] if base else [])), None)
        self._references = self._known_rivals(pool)
        self._entered: list[Rival] = []
        self._best: Rival | None = None
        self._front: list[Rival] = []
        self._outlooks: dict[int, Outlook] = {}

    @property
    def is_open(self) -> bool:
        """Whether nothing was scored in full yet."""
        return self._best is None

    def enter(self, plan: MergePlan) -> bool:
        """Take in a plan that was scored in full; return whether it is the best so far."""
        rival = self._rival(plan)
        self._entered = [*self._entered[-_POOL:], rival]
        self._outlooks.clear()
        standing = self.objective.standing(rival.scores)
        is_best = self._best is None or standing > self.objective.standing(self._best.scores)
        if is_best:
            self._best = rival
        dominates = self.objective.dominates
        if self.objective.is_feasible(rival.scores) and not any(
            dominates(other.scores, rival.scores) for other in self._front
        ):
            self._front = [o for o in self._front if not dominates(rival.scores, o.scores)]
            self._front.append(rival)
        return is_best

    def rounds(self) -> Sequence[Round]:
        """Return the rounds in the order that tells soonest whether a candidate may win."""
        rounds = self._schedule.rounds["select"]
        if self._racing is None or self._best is None:
            return rounds
        expected = {}
        for task, squares in self._outlook(self._best).squares.items():
            blocks = self._schedule.blocks["select"][task]
            ends = np.cumsum([len(block.examples) for block in blocks])
            unit = (self.objective.unit(task) / len(squares)) ** 2
            for block, own in zip(blocks, np.split(squares, ends[:-1]), strict=True):
                expected[block.key] = unit * float(own.sum())
        return sorted(rounds, key=lambda own: -sum(expected[block.key] for block in own))

    def goes_on(self, plan: MergePlan) -> bool:
        """Return whether a candidate may still win."""
        if self._racing is None:
            return True
        best = [self._best] if self._best else []
        rivals = self._front if self.objective.kind == "tasks" else best
        return not self._racing.stops(
            self.objective,
            self._schedule.blocks["select"],
            self._scores.get(plan),
            [(rival, self._outlook(rival)) for rival in rivals],
            (self._base, self._outlook(self._base)) if self._base else None,
        )

    def estimate(self, plan: MergePlan) -> tuple[dict[str, float], int]:
        """Return the task scores expected of a stopped plan, and on how many blocks they rest.

        Raises:
            StudyError: If there is nothing to pair it with.
        """
        rival = self._best or self._base
        if rival is None:
            raise StudyError("a trial was stopped early though nothing was scored in full")
        blocks, known = self._schedule.blocks["select"], self._scores.get(plan)
        predicted = predict(blocks, known, rival, self._outlook(rival))
        scores = {**rival.scores, **predicted.scores}
        return scores, sum(block.key in known for own in blocks.values() for block in own)

    def _outlook(self, rival: Rival) -> Outlook:
        if id(rival) not in self._outlooks:
            pool = [*self._references, *self._entered]
            self._outlooks[id(rival)] = outlook_of(pool, rival)
        return self._outlooks[id(rival)]

    def _known_rivals(self, plans: Iterable[MergePlan]) -> list[Rival]:
        is_known = self._schedule.is_known
        return [self._rival(plan) for plan in plans if is_known(self._scores, plan, "select")]

    def _rival(self, plan: MergePlan) -> Rival:
        blocks = self._schedule.blocks["select"]
        values = {
            task: np.array(self._scores.task_values(plan, own)) for task, own in blocks.items()
        }
        return Rival({task: float(own.mean()) for task, own in values.items()}, values)

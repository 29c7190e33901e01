"""From the tasks' scores to what the study maximises."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from searchmerge.errors import StudyError

Kind = Literal["normalised", "mean", "worst", "tasks"]
Against = Literal["expert", "base", "score"]
Pick = Literal["mean", "worst"]
Extent = Literal["all", "own"]
"""Held out, the base and the experts are scored on all tasks, or each expert on those that name it
and the base on those with a constraint held against it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a task counts for.

    Attributes:
        weight: Its weight in the mean, above 0.
        expert: The expert of that task, whose score normalises it; ``None`` to leave it raw.
    """

    weight: float = 1.0
    expert: str | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound that a plan has to keep on one task.

    Attributes:
        task: Name of the task.
        against: What the score is divided by: the task's own expert's, the base's, or nothing.
        at_least: The smallest value allowed; 0.98 against ``expert`` allows a loss of 2 %.
    """

    task: str
    against: Against
    at_least: float

    @property
    def name(self) -> str:
        """Return what it is called in reports and in the study's storage."""
        scale = {"expert": "its own expert's", "base": "the base's", "score": ""}[self.against]
        return f"{self.task} at least {self.at_least:g} {scale and f'of {scale}'}".strip()


@dataclass(frozen=True)
class Objective:
    r"""Turns one score per task into one value, or into one value per task.

    - ``normalised``: the weighted mean of score over the own expert's score. For a task whose
      scores may be negative this is :math:`1 + (s - s_e) / |s_e|`, the same where both are
      positive.
    - ``mean``: the weighted mean of the scores as they are.
    - ``worst``: the smallest normalised score.
    - ``tasks``: one objective per task, normalised, for a Pareto front. The plan that is saved
      is picked from the front by ``pick``: ``mean``, the highest weighted mean; ``worst``, the
      highest smallest value.

    A plan that breaks a constraint is behind every plan that keeps them all; of two that break
    some, the one that breaks them by less in total is ahead.

    Attributes:
        kind: One of the above.
        goals: Task name to what it counts for.
        expert_scores: Task name to its own expert's score on the same examples.
        base_scores: Task name to the base's score on the same examples.
        constraints: What a plan has to keep.
        pick: Which plan of a front is saved.
    """

    kind: Kind
    goals: Mapping[str, Goal]
    expert_scores: Mapping[str, float] = field(default_factory=dict)
    base_scores: Mapping[str, float] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    pick: Pick = "mean"

    @property
    def names(self) -> tuple[str, ...]:
        """Return a name for each value that :meth:`values` returns."""
        return tuple(self.goals) if self.kind == "tasks" else (self.kind,)

    @property
    def label(self) -> str:
        """Return what its one value is called, of several objectives that by which is picked."""
        return f"tasks (by {self.pick})" if self.kind == "tasks" else self.kind

    @property
    def raw(self) -> tuple[str, ...]:
        """Return the tasks that count as they are scored, for want of an own expert."""
        if self.kind == "mean":
            return ()
        return tuple(task for task, goal in self.goals.items() if goal.expert is None)

    @property
    def needs_experts(self) -> bool:
        """Whether the own experts' scores enter."""
        return self.kind != "mean" or any(c.against == "expert" for c in self.constraints)

    def relative_to(
        self,
        expert_scores: Mapping[str, float],
        base_scores: Mapping[str, float],
        explain: Callable[[str], str] = lambda task: "",
    ) -> "Objective":
        """Return the same objective with the own experts' and the base's scores put in.

        Args:
            expert_scores: Task name to its own expert's score.
            base_scores: Task name to the base's score.
            explain: Returns what there is to tell of a task whose own expert scores 0.

        Raises:
            StudyError: If one that others are divided by is exactly 0.
        """
        for task, score in expert_scores.items():
            if self.needs_experts and self.goals[task].expert and score == 0:
                raise StudyError(
                    f"tasks.{task}: its own expert {self.goals[task].expert!r} scores 0 there, "
                    "so that no score can be normalised by it; "
                    f"{explain(task) or 'see that it is scored as it was trained'}, or use "
                    "objective: mean"
                )
        for constraint in self.constraints:
            if constraint.against == "base" and not base_scores.get(constraint.task):
                raise StudyError(
                    f"constraints: the base scores {base_scores.get(constraint.task)} on "
                    f"{constraint.task!r}, so that no score can be held against it; "
                    "use against: score"
                )
        return replace(self, expert_scores=dict(expert_scores), base_scores=dict(base_scores))

    def on_other_examples(
        self, expert_scores: Mapping[str, float], base_scores: Mapping[str, float]
    ) -> "Objective":
        """Return the same objective relative to what experts and base score on other examples.

        What scores 0 there, or is not scored, nothing can be divided by: it stays what it was.
        """
        experts = {task: score for task, score in expert_scores.items() if score}
        base = {task: score for task, score in base_scores.items() if score}
        return replace(
            self,
            expert_scores={**self.expert_scores, **experts},
            base_scores={**self.base_scores, **base},
        )

    def undivided(
        self, expert_scores: Mapping[str, float], base_scores: Mapping[str, float]
    ) -> tuple[str, ...]:
        """Return what cannot be divided by on other examples, and stays what it was, in words."""
        bounds = {(c.task, c.against) for c in self.constraints}
        relative = set(self.goals) if self.kind != "mean" else set()
        experts = [t for t in self.expert_scores if t in relative or (t, "expert") in bounds]
        base = [task for task in self.base_scores if (task, "base") in bounds]
        return (
            *(f"its own expert on {task}" for task in experts if not expert_scores.get(task)),
            *(f"the base on {task}" for task in base if not base_scores.get(task)),
        )

    def violation(self, constraint: Constraint, scores: Mapping[str, float]) -> float:
        """Return by how much ``scores`` break a constraint; 0 or less where they keep it."""
        score = scores[constraint.task]
        if constraint.against == "expert":
            score = _ratio(score, self.expert_scores[constraint.task])
        elif constraint.against == "base":
            score = _ratio(score, self.base_scores[constraint.task])
        return constraint.at_least - score

    def violations(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return each constraint's violation by its name."""
        return {c.name: self.violation(c, scores) for c in self.constraints}

    def is_feasible(self, scores: Mapping[str, float]) -> bool:
        """Return whether ``scores`` keep every constraint."""
        return all(violation <= 0 for violation in self.violations(scores).values())

    def normalised(self, task: str, score: float) -> float:
        """Return ``score`` in units of the own expert's, where there is one."""
        expert_score = self.expert_scores.get(task)
        if expert_score is None or self.kind == "mean":
            return score
        return _ratio(score, expert_score)

    def unit(self, task: str) -> float:
        """Return by how much the weighted mean grows with the task's score."""
        total = sum(goal.weight for goal in self.goals.values())
        slope = self.normalised(task, 1.0) - self.normalised(task, 0.0)
        return self.goals[task].weight / total * slope

    def values(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Return the value of each objective, higher is better."""
        normalised = {task: self.normalised(task, scores[task]) for task in self.goals}
        if self.kind == "tasks":
            return tuple(normalised.values())
        if self.kind == "worst":
            return (min(normalised.values()),)
        return (self.weighted_mean(normalised),)

    def scalar(self, scores: Mapping[str, float]) -> float:
        """Return one value to rank plans by: the objective; of several what ``pick`` says."""
        if self.kind != "tasks":
            return self.values(scores)[0]
        if self.pick == "worst":
            return min(self.values(scores))
        return self.weighted_mean(dict(zip(self.goals, self.values(scores), strict=True)))

    def weighted_mean(self, scores: Mapping[str, float]) -> float:
        """Return the mean of the tasks' numbers, each counted with its weight."""
        total = sum(goal.weight for goal in self.goals.values())
        return sum(goal.weight * scores[task] for task, goal in self.goals.items()) / total


def _ratio(score: float, unit: float) -> float:
    """Return ``score / unit``, in the form that also holds below 0 and at it."""
    if unit == 0:
        return 1.0 if score == 0 else math.copysign(math.inf, score)
    return 1.0 + (score - unit) / abs(unit)

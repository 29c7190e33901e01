"""From the tasks' scores to what the study maximises."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from searchmerge.errors import StudyError

Kind = Literal["normalised", "mean", "worst", "tasks"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a task counts for.

    Attributes:
        weight: Its weight in the mean, above 0.
        expert: The expert of that task, whose score normalises it; ``None`` to leave it raw.
    """

    weight: float = 1.0
    expert: str | None = None


@dataclass(frozen=True)
class Objective:
    r"""Turns one score per task into one value, or into one value per task.

    - ``normalised``: the weighted mean of score over the own expert's score. For a task whose
      scores may be negative this is :math:`1 + (s - s_e) / |s_e|`, the same where both are
      positive.
    - ``mean``: the weighted mean of the scores as they are.
    - ``worst``: the smallest normalised score.
    - ``tasks``: one objective per task, normalised, for a Pareto front.

    Attributes:
        kind: One of the above.
        goals: Task name to what it counts for.
        references: Task name to its own expert's score on the same examples.
    """

    kind: Kind
    goals: Mapping[str, Goal]
    references: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Return a name for each value that :meth:`values` returns."""
        return tuple(self.goals) if self.kind == "tasks" else (self.kind,)

    @property
    def needs_references(self) -> bool:
        """Whether the own experts' scores enter."""
        return self.kind != "mean"

    def referring_to(self, references: Mapping[str, float]) -> "Objective":
        """Return the same objective with the own experts' scores put in.

        Raises:
            StudyError: If an own expert scored exactly 0, which normalises nothing.
        """
        for task, score in references.items():
            if self.needs_references and self.goals[task].expert and score == 0:
                raise StudyError(
                    f"tasks.{task}: its own expert {self.goals[task].expert!r} scores 0 there, "
                    "so that no score can be normalised by it; "
                    "use objective: mean, or leave expert: out"
                )
        return Objective(self.kind, self.goals, dict(references))

    def normalised(self, task: str, score: float) -> float:
        """Return ``score`` in units of the own expert's, where there is one."""
        reference = self.references.get(task)
        if reference is None or self.kind == "mean":
            return score
        return 1.0 + (score - reference) / abs(reference)

    def values(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Return the value of each objective, higher is better."""
        normalised = {task: self.normalised(task, scores[task]) for task in self.goals}
        if self.kind == "tasks":
            return tuple(normalised.values())
        if self.kind == "worst":
            return (min(normalised.values()),)
        return (self.weighted_mean(normalised),)

    def scalar(self, scores: Mapping[str, float]) -> float:
        """Return one value to rank plans by: the objective, or the mean of several."""
        if self.kind == "tasks":
            normalised = {task: self.normalised(task, scores[task]) for task in self.goals}
            return self.weighted_mean(normalised)
        return self.values(scores)[0]

    def weighted_mean(self, scores: Mapping[str, float]) -> float:
        """Return the mean of the tasks' numbers, each counted with its weight."""
        total = sum(goal.weight for goal in self.goals.values())
        return sum(goal.weight * scores[task] for task, goal in self.goals.items()) / total

"""The refinements of a study: of its best plans, kept in its directory, scored like trials."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from searchmerge.errors import SpecError
from searchmerge.execution.executor import Executor
from searchmerge.merging.method import linear_hyperparameter
from searchmerge.plan import MergePlan
from searchmerge.search.candidates import candidates
from searchmerge.search.descent import regrouped
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.references import merges
from searchmerge.search.refine import Material, Recipe, refinement
from searchmerge.search.refiner import Refiner
from searchmerge.search.runner import StudyRunner
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord, best_of

Plans = Mapping[str, MergePlan]


@dataclass(frozen=True, slots=True)
class Refining:
    """What a study refines, and how.

    Attributes:
        recipe: How.
        n_starts: How many plans.
        names: Of all parameters that are merged.
    """

    recipe: Recipe
    n_starts: int
    names: tuple[str, ...]

    def start(self, plan: MergePlan) -> MergePlan | None:
        """Return a plan with the groups of the recipe; ``None`` where it cannot be refined."""
        try:
            linear_hyperparameter(plan.method)
            return regrouped(plan, self.recipe.groups, self.names)
        except SpecError:
            return None

    def key(self, plan: MergePlan) -> str:
        """Return what tells the refinement of a plan from all others."""
        recipe = {**asdict(self.recipe), "groups": self.recipe.groups.names}
        return f"{plan.digest}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"


def material(
    board: Scoreboard,
    objective: Objective,
    recipe: Recipe,
    teachers: Plans,
) -> Material:
    """Return what refinements learn from: all tasks that have the recipe's loss.

    Args:
        board: Whose ``pilot`` examples are those that trials see.
        objective: What each task counts for.
        recipe: Which loss.
        teachers: Task name to the plan of its own expert.

    Raises:
        SpecError: If no task has it.
    """
    having = [
        task
        for task, info in board.schedule.tasks.items()
        if recipe.loss in info.losses and (recipe.loss != "agreement" or task in teachers)
    ]
    if not having:
        raise SpecError(
            f"search.refine: no task has the loss {recipe.loss!r}"
            + (" and an expert of its own" if recipe.loss == "agreement" else "")
        )
    return Material(
        {
            task: [e for block in board.schedule.blocks["pilot"][task] for e in block.examples]
            for task in having
        },
        {task: objective.goals[task].weight for task in having},
        {task: teachers[task] for task in having if task in teachers},
    )


class Refinements:
    """Refines the best plans that there are, each once, and scores what that proposes.

    Args:
        directory: Keeps what came of it.
        runner: Scores plans.
        executor: Computes gradients.
        observer: Shows a person what happens.
        refining: What is refined, and how.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        runner: StudyRunner,
        executor: Executor,
        observer: Observer,
        refining: Refining,
    ) -> None:
        self._directory = directory
        self._runner = runner
        self._refiner = Refiner(executor)
        self._observer = observer
        self._refining = refining

    def run(self, references: Plans, objective: Objective, material: Material) -> None:
        """Refine the best of trials and references, and score what is proposed.

        Args:
            references: Name to plan of those that were scored on what trials see.
            objective: With the experts' scores put in.
            material: What to learn from.
        """
        self._refine(self._starts(references, objective), material)
        kept = self._directory.refined()
        proposed = {
            f"refined {k['name']}": (key, MergePlan.from_dict(k["plan"]))
            for key, k in kept.items()
            if "plan" in k and "scores" not in k
        }
        plans = {name: plan for name, (_, plan) in proposed.items()}
        for name in self._runner.score_plans("refined plans", plans, "select"):
            key, plan = proposed[name]
            record = TrialRecord(-1, plan, refines=kept[key]["name"])
            judged = self._judged(record, objective)
            self._directory.keep_refined(key, {**kept[key], "scores": judged.completed_scores()})

    def _starts(self, references: Plans, objective: Objective) -> dict[str, MergePlan]:
        """Return the best plans that can be refined, by what they are called, best first."""
        scored = [
            self._judged(TrialRecord(-1 - i, plan, refines=name), objective)
            for i, (name, plan) in enumerate(references.items())
            if plan in merges(references)
        ]
        known = {record.plan.digest: record.refines for record in scored}
        trials = [
            record
            for record in candidates(self._directory.records(), objective)
            if record.is_full and not record.refines and record.plan.digest not in known
        ]
        starts: dict[str, MergePlan] = {}
        for record in best_of([*scored, *trials], len(scored) + len(trials)):
            if len(starts) < self._refining.n_starts and self._refining.start(record.plan):
                starts[record.refines or record.name] = record.plan
        return starts

    def _judged(self, record: TrialRecord, objective: Objective) -> TrialRecord:
        """Return a record with what its plan scored on all that trials see."""
        board, plan = self._runner.board, record.plan
        scores, estimates = board.scores(plan, "select"), board.estimates(plan, "select")
        return record.judged(objective, scores, estimates)

    def _refine(self, starts: Plans, material: Material) -> None:
        """Refine plans that were not refined yet, and keep what comes of it."""
        refining, done = self._refining, self._directory.refined()
        begun = {
            name: start
            for name, plan in starts.items()
            if refining.key(plan) not in done and (start := refining.start(plan)) is not None
        }
        self._observer.phase("refining", len(begun))
        results = self._refiner.run(
            {name: refinement(start, refining.recipe, material) for name, start in begun.items()},
            report=lambda name: self._observer.step(f"refined {name}", {}),
        )
        for name, refined in results.items():
            kept: dict[str, Any] = {"name": name}
            if refined is not None:
                kept |= {**asdict(refined), "plan": refined.plan.to_dict()}
            self._directory.keep_refined(refining.key(starts[name]), kept)

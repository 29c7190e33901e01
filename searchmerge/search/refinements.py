"""The refinements of a study: of its best plans; what they propose is run as trials."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from searchmerge.errors import SpecError
from searchmerge.execution.executor import Executor
from searchmerge.interrupts import held_back
from searchmerge.merging.method import linear_hyperparameter
from searchmerge.plan import MergePlan
from searchmerge.search.budget import StudyClock
from searchmerge.search.candidates import candidates
from searchmerge.search.crashes import MAX_CUT_OFF
from searchmerge.search.descent import regrouped
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.loss_store import remembered
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.pick import reference_records
from searchmerge.search.racing import Racing
from searchmerge.search.refine import (
    LEAST_EXAMPLES,
    Material,
    Recipe,
    Refined,
    Refinement,
    Report,
    refinement,
)
from searchmerge.search.refiner import End, GivenUp, Refiner
from searchmerge.search.runner import StudyRunner
from searchmerge.search.schedule import Schedule
from searchmerge.search.trials import best_of
from searchmerge.wording import counted

_logger = logging.getLogger(__name__)

_N_NAMED = 3  # plans that a line names

Plans = Mapping[str, MergePlan]


@dataclass(frozen=True, slots=True)
class Refining:
    """What a study refines, and how.

    Attributes:
        recipe: How.
        n_starts: How many plans.
        names: Of all parameters that are merged.
        functions: Task name to the user's function that gives its loss, where one does.
    """

    recipe: Recipe
    n_starts: int
    names: tuple[str, ...]
    functions: Mapping[str, str] = field(default_factory=dict)

    def start(self, plan: MergePlan) -> MergePlan:
        """Return a plan with the groups of the recipe.

        Raises:
            SpecError: If it cannot be refined.
        """
        linear_hyperparameter(plan.method)
        return regrouped(plan, self.recipe.groups, self.names)

    def key(self, plan: MergePlan) -> str:
        """Return what tells the refinement of a plan from all others."""
        recipe = {**asdict(self.recipe), "groups": self.recipe.groups.names}
        if self.functions and self.recipe.loss == "labels":
            recipe["functions"] = sorted(self.functions.items())
        return f"{plan.digest}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"


def material(
    schedule: Schedule,
    objective: Objective,
    recipe: Recipe,
    teachers: Plans,
) -> Material:
    """Return what refinements learn from: all tasks that have the recipe's loss.

    Examples that have no label are learnt from too, where the loss needs none.

    Args:
        schedule: Whose ``pilot`` examples are those that trials see.
        objective: What each task counts for.
        recipe: Which loss.
        teachers: Task name to the plan of its own expert.

    Raises:
        SpecError: If no task has it, or one has too few examples.
    """
    examples, left_out = {}, {}
    for task, info in schedule.tasks.items():
        pilot = [e for block in schedule.blocks["pilot"][task] for e in block.examples]
        if recipe.loss != "labels":
            pilot += info.unlabelled
        without = set(info.without_loss)
        having = [example for example in pilot if example not in without]
        n_without, is_enough = len(pilot) - len(having), len(having) >= LEAST_EXAMPLES
        if n_without:
            left_out[task] = _left_out(n_without, len(pilot), is_enough=is_enough)
        if recipe.loss not in info.losses or (recipe.loss == "agreement" and task not in teachers):
            continue
        if is_enough:
            examples[task] = having
        elif not n_without:
            raise SpecError(
                f"search.refine: task {task!r} has {counted(len(having), 'example')} to learn "
                f"from; {LEAST_EXAMPLES} or more are needed, since some of them decide how far to "
                "go; raise its select"
            )
    if not examples:
        whose = " and an expert of its own" if recipe.loss == "agreement" else ""
        without_any = "".join(f"; {task}: {its} have none" for task, its in left_out.items())
        raise SpecError(f"search.refine: no task has the loss {recipe.loss!r}{whose}{without_any}")
    return Material(
        examples,
        {task: objective.goals[task].weight for task in examples},
        {task: teachers[task] for task in examples if task in teachers},
        left_out,
    )


def _left_out(n_without: int, n_all: int, *, is_enough: bool) -> str:
    """Return how many of a task's examples are left out for want of a loss."""
    if n_without == n_all:
        return f"all {counted(n_all, 'example')}"
    few = "" if is_enough else f" (and the others, fewer than {LEAST_EXAMPLES})"
    return f"{n_without} of {counted(n_all, 'example')}{few}"


class Refinements:
    """Refines the best plans that there are, each once, and has what that proposes scored.

    Args:
        directory: Keeps what came of it, and what refinements were told until they end.
        runner: Runs trials.
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

    def run(
        self,
        references: Plans,
        objective: Objective,
        material: Material,
        racing: Racing | None = None,
        seed: int | None = None,
    ) -> None:
        """Refine the best of trials and references, and run what is proposed as trials.

        It takes nothing of the study's budget.

        Args:
            references: Name to plan of those that were scored on what trials see.
            objective: With the experts' scores put in.
            material: What to learn from.
            racing: Stops refined trials that collapse; ``None`` scores all in full.
            seed: Of how grades are read; ``None`` goes by the metric alone.
        """
        clock = StudyClock(self._directory.refining)
        self._directory.begin_run()
        try:
            starts, passed_over = self._starts(references, objective)
            _warn_of(passed_over)
            self._refine(starts, material, clock)
        finally:
            with held_back():
                clock.keep()
                self._directory.end_run()
        self._runner.run_refined(objective, racing, clock, seed)

    def starts(self, references: Plans, objective: Objective) -> dict[str, bool]:
        """Return what the best plans that can be refined are called, and whether each was.

        Args:
            references: As for :meth:`run`.
            objective: With the experts' scores put in.
        """
        starts, _ = self._starts(references, objective)
        done = self._directory.refined_keys()
        return {name: self._refining.key(plan) in done for name, plan in starts.items()}

    def _starts(
        self, references: Plans, objective: Objective
    ) -> tuple[dict[str, MergePlan], dict[str, list[str]]]:
        """Return the best plans that can be refined, by what they are called, best first.

        A trial that was stopped early is none of them, though it was completed since: a run that
        is taken up again refines what it would have refined.

        Returns:
            Those plans, and why others as good are not among them, with what these are called.
        """
        scored = reference_records(self._runner.board, references, objective).values()
        names = {plan.digest: name for name, plan in references.items()}
        trials = [
            record
            for record in candidates(self._directory.records(), objective)
            if record.stopped_after is None
            and not record.refines
            and record.plan.digest not in names
        ]
        starts: dict[str, MergePlan] = {}
        passed_over: dict[str, list[str]] = {}
        for record in best_of([*scored, *trials], len(scored) + len(trials)):
            if len(starts) == self._refining.n_starts:
                break
            name = names.get(record.plan.digest, record.name)
            try:
                self._refining.start(record.plan)
            except SpecError as error:
                passed_over.setdefault(str(error), []).append(name)
            else:
                starts[name] = record.plan
        return starts, passed_over

    def _refine(self, starts: Plans, material: Material, clock: StudyClock) -> None:
        """Refine plans that were not refined yet, and enqueue what comes of it."""
        begun, key_of = self._begun(starts, material), self._refining.key
        self._observer.phase("refining", len(begun) * (2 + len(self._refining.recipe.checks)))
        if begun and material.told:
            _logger.warning("%s", material.told)

        def ended(name: str, end: End) -> None:
            key = key_of(starts[name])
            match end:
                case GivenUp():  # the next run begins anew: what it failed of may be mended
                    self._directory.losses.forget(key)
                    told = f"{name}, given up"
                case None:
                    self._keep(name, key, None)
                    told = f"{name}, nothing gained"
                case Refined():
                    self._keep(name, key, end)
                    told = f"refined {name}"
            self._observer.step(told, {})

        self._refiner.run(begun, ended, clock.tick)

    def _begun(self, starts: Plans, material: Material) -> dict[str, Refinement]:
        """Return the refinements of plans that were not refined yet, by what the plans are called.

        One over which runs ended abruptly is kept as one that proposes nothing.
        """
        refining, done = self._refining, self._directory.refined_keys()
        begun: dict[str, Refinement] = {}
        for name, plan in starts.items():
            key, start = refining.key(plan), refining.start(plan)
            if key in done:
                continue
            if self._directory.count_refining(key) >= MAX_CUT_OFF:
                _logger.warning(
                    "%s cannot be refined: %d runs ended abruptly while they were at it",
                    *(name, MAX_CUT_OFF),
                )
                self._keep(name, key, None)
                continue
            course = refinement(start, refining.recipe, material, self._teller(name))
            begun[name] = remembered(course, self._directory.losses, key)
        return begun

    def _teller(self, name: str) -> Report:
        """Return what shows how far the refinement of the plan called ``name`` is."""
        n_steps = self._refining.recipe.n_steps

        def tell(step: int, told: float | str) -> None:
            here = f"{name}, step {step} of {n_steps}"
            if isinstance(told, str):
                self._observer.step(f"{here}: {told}", {})
            else:
                self._observer.step(here, {"loss": told})

        return tell

    def _keep(self, name: str, key: str, refined: Refined | None) -> None:
        """Enqueue what a refinement proposes, or keep that it proposes nothing."""
        if refined is None:
            self._directory.keep_unrefined(key, name)
        else:
            how = {k: v for k, v in asdict(refined).items() if k != "plan"}
            self._directory.enqueue_refined(name, refined.plan, {"key": key, **how})
        self._directory.losses.forget(key)


def _warn_of(passed_over: Mapping[str, Sequence[str]]) -> None:
    """Say which plans are not refined, by why they cannot be."""
    for reason, names in passed_over.items():
        others = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
        _logger.warning("not refined: %s%s: %s", ", ".join(names[:_N_NAMED]), others, reason)

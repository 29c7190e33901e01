"""Which plan is saved: the one with the best evidence, found or published."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.score_kind import Mean
from searchmerge.execution.blocks import Part
from searchmerge.plan import MergePlan
from searchmerge.search.distinct import are_near
from searchmerge.search.evidence import Evidence, Expected, Measured
from searchmerge.search.objective import Objective
from searchmerge.search.racing import PlanScores
from searchmerge.search.references import is_merge
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import Standing, TrialRecord

Plans = Mapping[str, MergePlan]
Tasks = Mapping[str, TaskInfo]


@dataclass(frozen=True, slots=True)
class Contender:
    """What is known of a plan by what trials see.

    Attributes:
        plan: The plan.
        scored: What it scored.
        kept: As :class:`~searchmerge.search.trials.Standing` has it.
    """

    plan: MergePlan
    scored: PlanScores
    kept: float

    @classmethod
    def of(
        cls, board: Scoreboard, plan: MergePlan, objective: Objective, part: Part = "select"
    ) -> "Contender":
        """Return what is known of a plan that was scored on all of ``part``."""
        kept = _kept(objective, board.scores(plan, part))
        return cls(plan, plan_scores(board, plan, part), kept)


def contenders(references: Plans, full: Iterable[TrialRecord]) -> dict[str, MergePlan]:
    """Return the plans that may be saved: the references, and what else was scored in full."""
    plans = dict(references)
    digests = {plan.digest for plan in references.values()}
    for record in full:
        if record.plan.digest not in digests:
            digests.add(record.plan.digest)
            plans[record.name] = record.plan
    return plans


def reference_records(
    board: Scoreboard, references: Plans, objective: Objective
) -> dict[str, TrialRecord]:
    """Return name to record of those references that merge, to be ranked among trials.

    Their numbers are below 0: no trial has them.

    Args:
        board: Holds their scores, all in full.
        references: Name to plan.
        objective: What to compare by.
    """
    return {
        name: TrialRecord(-1 - i, plan).judged(
            objective, board.scores(plan, "select"), board.estimates(plan, "select")
        )
        for i, (name, plan) in enumerate(references.items())
        if is_merge(name)
    }


def plan_scores(board: Scoreboard, plan: MergePlan, part: Part) -> PlanScores:
    """Return what a plan scored on all of ``part``, as grades are read."""
    return PlanScores(board.estimates(plan, part), board.observations(plan, part))


def measured(board: Scoreboard, plans: Plans, part: Part, objective: Objective) -> Measured:
    """Return what plans scored on ``part``, all in full, and how far that is chance."""
    scored = {name: plan_scores(board, plan, part) for name, plan in plans.items()}
    return _compared(scored, board.schedule.tasks, objective)


def _compared(scored: Mapping[str, PlanScores], tasks: Tasks, objective: Objective) -> Measured:
    """Return what plans scored on the same examples, and how far that is chance.

    Where the objective is no weighted mean of means over examples, nothing is known of chance:
    the variances are 0.
    """
    is_mean = objective.kind in ("normalised", "mean")
    if is_mean and all(isinstance(info.kind, Mean) for info in tasks.values()):
        observations = {name: its.values for name, its in scored.items()}
        return Measured.of(observations, {task: objective.unit(task) for task in objective.goals})
    values = [objective.scalar(its.scores) for its in scored.values()]
    return Measured(tuple(scored), np.array(values), np.zeros(len(values)))


def evidence_on_select(
    board: Scoreboard,
    plans: Plans,
    objective: Objective,
    stopped: Iterable[TrialRecord] = (),
) -> Evidence:
    """Return what is believed of plans after the search.

    Args:
        board: Holds their scores, all in full.
        plans: The references and the trials. What merges of them usually score is told by all
            but the base and the experts.
        objective: What to compare by.
        stopped: Trials that were stopped early, which tell that too.
    """
    scored = {name: plan_scores(board, plan, "select") for name, plan in plans.items()}
    return _believed(scored, board.schedule.tasks, objective, stopped)


def _believed(
    scored: Mapping[str, PlanScores],
    tasks: Tasks,
    objective: Objective,
    stopped: Iterable[TrialRecord],
) -> Evidence:
    """Return what is believed of plans by what they scored on the examples that select."""
    measured = _compared(scored, tasks, objective)
    values = np.array([objective.scalar(its.scores) for its in scored.values()])
    zero = float((values - measured.values).mean())  # measured values are relative to a mean
    expected = [
        Expected(objective.scalar(record.estimates) - zero, (record.se or 0.0) ** 2)
        for record in stopped
    ]
    typical = [name for name in measured.names if is_merge(name)] or list(measured.names)
    return Evidence.shrunken(measured, typical, expected)


def best_on_select(
    known: Mapping[str, Contender],
    references: Plans,
    tasks: Tasks,
    objective: Objective,
    stopped: Iterable[TrialRecord] = (),
) -> str | None:
    """Return the plan that would be saved by what trials see alone; ``None`` before a merge is.

    A trial that is nearly a reference is none that would be, as the reference stands for it.

    Args:
        known: Name to what is known of the references and the trials. Refined plans, which were
            learnt from what trials see, are to be left out: of them held-out examples tell.
        references: Which of them are references, and their plans.
        tasks: What is known of the tasks.
        objective: What to compare by.
        stopped: As for :func:`evidence_on_select`.
    """
    if not any(map(is_merge, known)):
        return None
    scored = {name: contender.scored for name, contender in known.items()}
    evidence = _believed(scored, tasks, objective, stopped)
    kept = {name: contender.kept for name, contender in known.items()}
    ranked = _ranked(kept, lambda names: evidence.of(names).ranked())
    plans = references.values()
    apart = (n for n in ranked if n in references or not are_near(known[n].plan, plans))
    return next(apart, None)


def confirmed(board: Scoreboard, before: Evidence, plans: Plans, objective: Objective) -> Evidence:
    """Return what is believed of plans after they were scored on held-out examples too.

    Those that break a constraint on what trials see are left out where there are others.

    Args:
        board: Holds their scores, all in full.
        before: What was believed after the search.
        plans: The plans that may be saved.
        objective: What to compare by.
    """
    kept = _kept_on_select(board, plans, objective)
    allowed = {name: plan for name, plan in plans.items() if kept[name] == max(kept.values())}
    return before.and_measured(measured(board, allowed, "hold_out", objective))


def ranking(board: Scoreboard, before: Evidence, plans: Plans, objective: Objective) -> list[str]:
    """Return all plans, best first: those that :func:`confirmed` leaves out come last.

    Args:
        board: As for :func:`confirmed`, and so are the others.
        before: What was believed after the search.
        plans: The plans that may be saved.
        objective: What to compare by.
    """

    def rank(names: Collection[str]) -> list[str]:
        alike = {name: plans[name] for name in names}
        return confirmed(board, before, alike, objective).ranked()

    return _ranked(_kept_on_select(board, plans, objective), rank)


def ranking_on_select(
    board: Scoreboard, before: Evidence, plans: Plans, objective: Objective
) -> list[str]:
    """Return all plans as :func:`ranking` does, by what trials see alone."""
    kept = _kept_on_select(board, plans, objective)
    return _ranked(kept, lambda names: before.of(names).ranked())


def _kept_on_select(board: Scoreboard, plans: Plans, objective: Objective) -> dict[str, float]:
    return {n: _kept(objective, board.scores(plan, "select")) for n, plan in plans.items()}


def _ranked(kept: Mapping[str, float], rank: Callable[[Collection[str]], list[str]]) -> list[str]:
    """Return plans by how far they keep the constraints, those that are alike in that ranked."""
    return [
        name
        for level in sorted(set(kept.values()), reverse=True)
        for name in rank([name for name, its in kept.items() if its == level])
    ]


def _kept(objective: Objective, scores: Mapping[str, float]) -> float:
    return Standing.of(objective.violations(scores).values(), 0.0).kept


def broken(board: Scoreboard, plans: Plans, objective: Objective) -> dict[str, tuple[str, ...]]:
    """Return the constraints that plans break on what trials see, of those that break some."""
    violations = {n: objective.violations(board.scores(p, "select")) for n, p in plans.items()}
    names = {n: tuple(c for c, by in its.items() if by > 0) for n, its in violations.items()}
    return {name: constraints for name, constraints in names.items() if constraints}

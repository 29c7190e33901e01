"""The best plans on held-out examples: what is scored there, and who is ahead."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.confirm import Bootstrap, Confirmation, Contest, confirm
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.distinct import are_near
from searchmerge.search.evidence import Evidence
from searchmerge.search.objective import Extent, Objective
from searchmerge.search.pick import broken, ranking, ranking_on_select
from searchmerge.search.references import BASE, is_merge
from searchmerge.search.runner import StudyRunner, TasksOf
from searchmerge.wording import counted

Plans = dict[str, MergePlan]
"""What a plan is called to the plan."""


class Compared(NamedTuple):
    """What came of held-out examples.

    Attributes:
        plans: What was scored on them, or need not be.
        tasks: Of each the tasks that it was scored on.
        confirmation: How those compare that were scored on all.
    """

    plans: Plans
    tasks: TasksOf
    confirmation: Confirmation


class HeldOut:
    """Scores plans on held-out examples, and compares them there.

    Args:
        directory: The study.
        runner: Scores plans.
        objective: What to compare by, relative to what trials see.
        experts: Task name to the plan name of its own expert.
        extent: What the base and the experts are scored on.
        bootstrap: How examples are resampled.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        runner: StudyRunner,
        objective: Objective,
        experts: Mapping[str, str],
        extent: Extent,
        bootstrap: Bootstrap,
    ) -> None:
        self._directory, self._runner, self._objective = directory, runner, objective
        self._experts, self._extent, self._bootstrap = experts, extent, bootstrap

    def compare(self, references: Plans, best: Plans, evidence: Evidence) -> Compared:
        """Score plans on held-out examples and compare the best candidates with the references.

        Args:
            references: Those that were scored.
            best: The best candidates.
            evidence: What is believed of all of them by what trials see.

        Raises:
            StudyError: If no reference, or no merge, can be scored on held-out examples.
        """
        plans = {**references, **best}
        ranked = ranking_on_select(self._runner.board, evidence, references, self._objective)
        ahead = tuple(itertools.takewhile(lambda name: not is_merge(name), ranked))
        tasks = tasks_held_out(self._extent, plans, self._objective, self._experts, ahead)
        wanted = {name: plan for name, plan in plans.items() if tasks[name]}
        names = self._runner.score_plans("confirmation", wanted, "hold_out", tasks)
        scored = {n: plan for n, plan in plans.items() if n in names or n not in wanted}
        return Compared(scored, tasks, self._confirm(scored, tasks, best, evidence))

    def _confirm(
        self, scored: Plans, tasks: TasksOf, best: Plans, evidence: Evidence
    ) -> Confirmation:
        objective = self._objective
        plans = {n: plan for n, plan in scored.items() if len(tasks[n]) == len(objective.goals)}
        found = [name for name in plans if name in best]
        if len(found) == len(plans) or not any(map(is_merge, plans)):
            what = "reference" if found else "merge"
            raise StudyError(
                f"{self._directory.run_dir}: no {what} could be scored on held-out examples, so "
                "that nothing is confirmed; see the warnings above, and run the study again"
            )
        board = self._runner.board
        return confirm(
            {n: board.values(plan, "hold_out", tasks[n]) for n, plan in scored.items()},
            Contest(
                found,
                ranking(board, evidence, plans, objective),
                broken(board, plans, objective),
                "" if found else self._absent(best),
            ),
            {name: info.kind for name, info in board.schedule.tasks.items()},
            objective,
            self._experts if objective.kind != "mean" else {},
            self._bootstrap,
        )

    def _absent(self, best: Plans) -> str:
        """Return why nothing that the search found could be confirmed."""
        failures = self._runner.failures
        if best:
            name = next(iter(best))
            return f"{', '.join(best)} could not be scored on held-out examples: {failures[name]}"
        references = list(self._runner.references.values())
        others = [r for r in self._directory.records() if not are_near(r.plan, references)]
        if not others:
            return "it ended among the references, before another merge was scored"
        if all(record.value is None for record in others):
            n_failed = counted(len(others), "trial")
            return f"{n_failed} beside the references failed, the first as {others[0].failure}"
        return "none of its trials could be scored in full"


def tasks_held_out(
    extent: Extent,
    plans: Iterable[str],
    objective: Objective,
    experts: Mapping[str, str],
    ahead: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Return on the held-out examples of which tasks each plan is scored.

    Merges are scored on those of all, and so is what is ahead of them: it may be saved.

    Args:
        extent: Which of them the others are scored on.
        plans: Names of the references and the best candidates.
        objective: What to compare by.
        experts: Task name to the plan name of its own expert.
        ahead: References with better evidence than all references that merge, before any is
            scored on them.
    """
    everything, own = tuple(objective.goals), dict[str, list[str]]()
    for task, name in experts.items():
        own.setdefault(name, []).append(task)
    own[BASE] = [c.task for c in objective.constraints if c.against == "base"]
    return {
        name: everything
        if extent == "all" or is_merge(name) or name in ahead
        else tuple(task for task in everything if task in own.get(name, ()))
        for name in plans
    }

"""Finding what the plans of a finished run said to held-out examples."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from searchmerge.errors import SpecError, StudyError
from searchmerge.evaluators.evaluator import Answer
from searchmerge.plan import MergePlan
from searchmerge.report.results import Results
from searchmerge.search.directory import SCORES_FILE, plan_file
from searchmerge.search.references import reference_plans
from searchmerge.search.scores import ScoreStore
from searchmerge.study import kept_study

BEST = "best"
"""What the winner is called on the command line."""


def kept_answers(
    run_dir: Path, task: str, names: Sequence[str]
) -> list[tuple[str, tuple[Answer, ...]]]:
    """Return what plans said to a task's held-out examples, each with the plan's name.

    Args:
        run_dir: The run directory.
        task: The study's name of the task.
        names: ``best``, or names of the report's table.

    Raises:
        SpecError: If there is no such task or plan.
        StudyError: If the run is not finished, a plan was not scored on the task, or the answers
            are not kept.
    """
    results = Results.load(run_dir)
    if task not in results.tasks:
        raise SpecError(f"--task {task}: no such task (there are: {', '.join(results.tasks)})")
    unscored = [row.name for row in results.rows if task not in row.hold_out]
    if name := next((name for name in names if name in unscored), None):
        raise StudyError(
            f"{run_dir}: {name} was not asked the held-out examples of {task!r}: with confirm: "
            "{experts: all} in the study the same `searchmerge run` asks it them too"
        )
    plans = {name: _plan(run_dir, results, name) for name in names}
    with contextlib.closing(ScoreStore(run_dir / SCORES_FILE)) as store:
        answers = [(name, store.answers(plan, task, "hold_out")) for name, plan in plans.items()]
    if any(not said for _, said in answers):
        raise StudyError(
            f"{run_dir}: what was said to {task!r} is not kept; give the study's task "
            "answers: keep and run it again, which scores held-out examples alone"
        )
    return answers


def _plan(run_dir: Path, results: Results, name: str) -> MergePlan:
    rows = {row.name: row.is_candidate for row in results.rows}
    if name in (BEST, results.winner):
        return results.merge_plan
    if name not in rows:
        raise SpecError(f"no plan {name!r} (there are: {BEST}, {', '.join(rows)})")
    if rows[name]:
        return MergePlan.from_yaml(plan_file(run_dir, name))
    return reference_plans(kept_study(run_dir).experts)[name]

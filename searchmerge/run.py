"""Running a study from its file to its results."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from searchmerge import assemble
from searchmerge.checkpoints.writer import PLAN_FILE
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError, StudyError
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan
from searchmerge.report.card import model_card
from searchmerge.report.front import save_front
from searchmerge.report.results import Bound, Point, PointKind, Results, Row
from searchmerge.search.confirm import confirm
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.objective import Objective
from searchmerge.search.references import BASE, expert_name, reference_plans
from searchmerge.search.runner import PLAN, RESULT, Observer, Schedule, StudyRunner
from searchmerge.search.storage import storage_errors
from searchmerge.search.study import StudyDirectory, locked
from searchmerge.spec import StudySpec, make_space

_logger = logging.getLogger(__name__)

MODEL_DIR = "model"
PLANS_DIR = "plans"


def run_study(
    spec: StudySpec, study_file: Path, config: RunConfig, run_dir: Path, observer: Observer
) -> Results:
    """Run a study to its end, from wherever an earlier run left it.

    Raises:
        SearchMergeError: If it cannot be run; all that was scored is kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        stack.enter_context(storage_errors(run_dir))
        models = assemble.open_models(spec, study_file)
        assemble.check_groups(spec, models)
        directory = stack.enter_context(
            contextlib.closing(assemble.open_directory(spec, study_file, models, config, run_dir))
        )
        executor = stack.enter_context(
            contextlib.closing(assemble.make_executor(spec, study_file, models, config))
        )
        schedule = assemble.make_schedule(spec, executor.tasks())
        references = reference_plans(tuple(spec.experts))
        runner = StudyRunner(
            directory,
            make_space(spec),
            schedule,
            Dispatcher(executor, directory.scores),
            references,
            observer,
        )
        results = _search(spec, study_file, runner, directory, schedule, references, models)
        results.save(run_dir)
        if results.points:
            save_front(results.points, results.winner, results.study, run_dir)
        _save_winner(spec, models, results, run_dir, observer)
        return results


def _search(  # noqa: PLR0913  (one call per phase, and they share all of these)
    spec: StudySpec,
    study_file: Path,
    runner: StudyRunner,
    directory: StudyDirectory,
    schedule: Schedule,
    references: Mapping[str, MergePlan],
    models: assemble.Models,
) -> Results:
    own = {name: expert_name(task.expert) for name, task in spec.tasks.items() if task.expert}
    scored = runner.score_plans("references", references, "select")
    if assemble.make_objective(spec).needs_references:
        assemble.check_own_experts(spec, scored, own)
    known = {name: plan for name, plan in references.items() if name in scored}
    select = {n: schedule.scores(directory.scores, p, "select") for n, p in known.items()}
    objective = assemble.make_objective(spec).referring_to(
        {task: select[name][task] for task, name in own.items() if name in select},
        select.get(BASE, {}),
    )
    if not directory.trials():  # a resumed study has them already
        runner.enqueue("warm start", assemble.warm_start(spec, study_file))
    runner.run(objective, assemble.make_budget(spec), assemble.make_racing(spec))
    found = top_plans(directory, objective, references, spec.confirm.top_k)
    _write_plans(directory, found)
    plans = {**known, **found}
    confirmed = runner.score_plans("confirmation", plans, "hold_out")
    plans = {name: plan for name, plan in plans.items() if name in confirmed}
    if not any(name in found for name in plans):
        raise StudyError(f"{directory.run_dir}: none of the best candidates could be confirmed")
    return _results(spec, study_file, directory, schedule, objective, plans, set(found), models)


def top_plans(
    directory: StudyDirectory,
    objective: Objective,
    references: Mapping[str, MergePlan],
    top_k: int,
) -> dict[str, MergePlan]:
    """Return the best fully scored trials that are no reference, best first.

    Plans that keep all constraints come before those that do not; with several objectives,
    those on the front before those that are dominated.

    Raises:
        StudyError: If there is none.
    """
    known = {plan.digest for plan in references.values()}
    full = full_trials(directory)
    front = {trial.number for trial in front_of(full, objective)}
    ranked = sorted(
        full,
        key=lambda t: (t.number in front, *objective.standing(t.user_attrs[RESULT]["scores"])),
        reverse=True,
    )
    if ranked and objective.is_feasible(ranked[0].user_attrs[RESULT]["scores"]):
        ranked = [t for t in ranked if objective.is_feasible(t.user_attrs[RESULT]["scores"])]
    found: dict[str, MergePlan] = {}
    for trial in ranked:
        plan = MergePlan.from_dict(trial.user_attrs[PLAN])
        if plan.digest not in known and len(found) < top_k:
            known.add(plan.digest)
            found[f"trial {trial.number}"] = plan
    if not found:
        raise StudyError(
            f"{directory.run_dir}: no trial was scored in full, so there is nothing to confirm; "
            "give the search more trials or time"
        )
    return found


def full_trials(directory: StudyDirectory) -> list[FrozenTrial]:
    """Return the trials that were scored on every example they could be, by number."""
    complete = directory.trials(TrialState.COMPLETE)
    return [trial for trial in complete if trial.user_attrs[RESULT]["partial"] is None]


def front_of(trials: Sequence[FrozenTrial], objective: Objective) -> list[FrozenTrial]:
    """Return the trials that keep all constraints and that no other such trial dominates.

    With one objective there is no front, and none is returned.
    """
    if len(objective.names) < 2:
        return []
    scored = [(trial, trial.user_attrs[RESULT]["scores"]) for trial in trials]
    scored = [(trial, scores) for trial, scores in scored if objective.is_feasible(scores)]
    return [
        trial
        for trial, scores in scored
        if not any(objective.dominates(other, scores) for _, other in scored)
    ]


def _write_plans(directory: StudyDirectory, found: Mapping[str, MergePlan]) -> None:
    folder = directory.run_dir / PLANS_DIR
    folder.mkdir(exist_ok=True)
    for name, plan in found.items():
        plan.to_yaml(folder / f"{name.replace(' ', '-')}.yaml")


def _results(  # noqa: PLR0913
    spec: StudySpec,
    study_file: Path,
    directory: StudyDirectory,
    schedule: Schedule,
    objective: Objective,
    plans: Mapping[str, MergePlan],
    found: set[str],
    models: assemble.Models,
) -> Results:
    store, blocks = directory.scores, schedule.blocks["hold_out"]
    own = {name: expert_name(task.expert) for name, task in spec.tasks.items() if task.expert}
    confirmation = confirm(
        {n: {t: store.task_values(p, b) for t, b in blocks.items()} for n, p in plans.items()},
        [name for name in plans if name in found],
        objective,
        own if spec.objective != "mean" else {},
        level=spec.confirm.level,
        n_resamples=spec.confirm.n_resamples,
        seed=spec.search.seed,
    )
    rows = []
    for name, plan in plans.items():
        interval = confirmation.objective[name]
        rows.append(
            Row(
                name,
                schedule.scores(store, plan, "select"),
                schedule.scores(store, plan, "hold_out"),
                (interval.value, interval.low, interval.high),
                name in found,
            )
        )
    by_name = {row.name: row for row in rows}
    held_out = replace(
        objective,
        references={t: by_name[n].hold_out[t] for t, n in own.items() if n in by_name},
        base=by_name[BASE].hold_out if BASE in by_name else {},
    )
    winner = by_name[confirmation.winner]
    sources = {"base": models.base.name, **models.sources}
    made_of = {n: f"`{sources[n]}`, {mark}" for n, mark in models.fingerprints().items()}
    return Results(
        study=assemble.study_name(spec, study_file),
        tasks={t: s.metric or "default metric" for t, s in spec.tasks.items()},
        objective=spec.objective,
        rows=rows,
        winner=confirmation.winner,
        verdict=confirmation.verdict,
        plan=plans[confirmation.winner].to_dict(),
        counts=_counts(directory, schedule),
        level=confirmation.level,
        made_of=made_of | assemble.versions(),
        bounds=_bounds(winner, objective, held_out),
        points=_points(directory, rows, objective),
    )


def _bounds(winner: Row, objective: Objective, held_out: Objective) -> list[Bound]:
    """Return how the winner stands to each constraint, on what trials saw and held out."""
    return [
        Bound(
            constraint.name,
            constraint.at_least,
            constraint.at_least - objective.violation(constraint, winner.select),
            constraint.at_least - held_out.violation(constraint, winner.hold_out),
        )
        for constraint in objective.constraints
    ]


def _points(directory: StudyDirectory, rows: Sequence[Row], objective: Objective) -> list[Point]:
    """Return all that was scored in full as points of several objectives; none of one."""
    if len(objective.names) < 2:
        return []
    trials = full_trials(directory)
    front = {trial.number for trial in front_of(trials, objective)}
    scored: list[tuple[str, Mapping[str, float], PointKind]] = [
        (
            f"trial {trial.number}",
            trial.user_attrs[RESULT]["scores"],
            "front" if trial.number in front else "trial",
        )
        for trial in trials
    ]
    scored += [(row.name, row.select, "reference") for row in rows if not row.is_candidate]
    return [
        Point(name, dict(zip(objective.names, objective.values(scores), strict=True)), kind)
        for name, scores, kind in scored
    ]


def _counts(directory: StudyDirectory, schedule: Schedule) -> dict[str, float]:
    complete = directory.trials(TrialState.COMPLETE)
    n_partial = sum(trial.user_attrs[RESULT]["partial"] is not None for trial in complete)
    counts: dict[str, float] = {
        "trials in full": len(complete) - n_partial,
        "trials stopped early": n_partial,
        "trials failed": len(directory.trials(TrialState.FAIL)),
    }
    for part, tasks in schedule.blocks.items():
        label = part.replace("_", "-")
        counts[f"{label} examples"] = sum(len(b.examples) for own in tasks.values() for b in own)
    counts["search seconds"] = round(directory.elapsed_s)
    return counts


def _save_winner(
    spec: StudySpec,
    models: assemble.Models,
    results: Results,
    run_dir: Path,
    observer: Observer,
) -> None:
    """Write the winner, unless it is there already."""
    out, plan = run_dir / MODEL_DIR, results.merge_plan
    card = model_card(results, models.base.name, models.sources)
    if _is_saved(out, plan):
        (out / "README.md").write_text(card, encoding="utf-8")
        return
    observer.phase("saving the model", None)
    vectors: TaskVectors = assemble.load_task_vectors(models, spec)
    assemble.save_merge(models, vectors, plan, out, card=card)


def _is_saved(out: Path, plan: MergePlan) -> bool:
    try:
        return MergePlan.from_yaml(out / PLAN_FILE) == plan
    except SpecError:
        return False

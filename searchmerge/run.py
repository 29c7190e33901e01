"""Running a study from its file to its results."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optuna.trial import TrialState

from searchmerge import assemble
from searchmerge.checkpoints.writer import PLAN_FILE
from searchmerge.classifier import SavedHead, head_files
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError, StudyError
from searchmerge.execution.blocks import Part
from searchmerge.fingerprint import versions
from searchmerge.heads import saved_heads
from searchmerge.models import (
    Models,
    check_groups,
    load_task_vectors,
    open_models,
    save_merge,
    warn_of_doubts,
)
from searchmerge.plan import MergePlan
from searchmerge.report.card import model_card
from searchmerge.report.front import save_front
from searchmerge.report.results import Bound, Point, PointKind, Results, Row
from searchmerge.search.candidates import best_of, candidates, front_of
from searchmerge.search.confirm import confirm
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.objective import Objective
from searchmerge.search.references import BASE, reference_plans
from searchmerge.search.runner import RESULT, Observer, StudyRunner
from searchmerge.search.schedule import Schedule
from searchmerge.search.storage import storage_errors
from searchmerge.search.study import StudyDirectory, locked
from searchmerge.spec import merge_overrides
from searchmerge.study import Study

_logger = logging.getLogger(__name__)

MODEL_DIR = "model"
PLANS_DIR = "plans"
_BEGUN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL)


def run_study(study: Study, config: RunConfig, run_dir: Path, observer: Observer) -> Results:
    """Run a study to its end, from wherever an earlier run left it.

    Raises:
        SearchMergeError: If it cannot be run; all that was scored is kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        stack.enter_context(storage_errors(run_dir))
        models = open_models(study)
        check_groups(study, models)
        warn_of_doubts(models)
        directory = stack.enter_context(
            contextlib.closing(assemble.open_directory(study, models, config, run_dir))
        )
        if not directory.trials(*_BEGUN):  # a study that was resumed has them already
            directory.enqueue("warm start", assemble.warm_start(study))
        executor = stack.enter_context(
            contextlib.closing(assemble.make_executor(study, models, config))
        )
        schedule = assemble.make_schedule(study, executor.tasks())
        references = reference_plans(study.experts)
        runner = StudyRunner(
            directory,
            study.space,
            schedule,
            Dispatcher(executor, directory.scores),
            references,
            observer,
        )
        results = _search(study, runner, directory, references, models)
        results.save(run_dir)
        if results.points:
            save_front(results.points, results.winner, results.study, run_dir)
        _save_winner(study, models, results, run_dir, observer)
        return results


def _search(
    study: Study,
    runner: StudyRunner,
    directory: StudyDirectory,
    references: Mapping[str, MergePlan],
    models: Models,
) -> Results:
    own = study.task_experts
    known = runner.score_references()
    schedule = runner.schedule
    if study.objective.needs_references:
        assemble.check_own_experts(study, set(known), own)
    select = {n: schedule.scores(directory.scores, p, "select") for n, p in known.items()}
    objective = study.objective.referring_to(
        {task: select[name][task] for task, name in own.items() if name in select},
        select.get(BASE, {}),
    )
    runner.run(objective, assemble.make_budget(study), assemble.make_racing(study))
    found = _complete_the_best(study, runner, directory, objective, references)
    _write_plans(directory, found)
    plans = {**known, **found}
    confirmed = runner.score_plans("confirmation", plans, "hold_out")
    plans = {name: plan for name, plan in plans.items() if name in confirmed}
    if not any(name in found for name in plans):
        raise StudyError(f"{directory.run_dir}: none of the best candidates could be confirmed")
    return _results(study, directory, schedule, objective, plans, set(found), models)


def _complete_the_best(
    study: Study,
    runner: StudyRunner,
    directory: StudyDirectory,
    objective: Objective,
    references: Mapping[str, MergePlan],
) -> dict[str, MergePlan]:
    """Return the best candidates, best first, after those stopped early are scored in full."""
    top_k, but = study.spec.confirm.top_k, list(references.values())
    best = best_of(candidates(directory, runner.schedule), objective, top_k, but)
    partial = {one.name: one.plan for one in best if not one.is_full}
    if partial:
        runner.score_plans("completing the best", partial, "select")
    known = [one for one in candidates(directory, runner.schedule) if one.is_full]
    best = best_of(known, objective, top_k, but)
    return {one.name: one.plan for one in best}


def _write_plans(directory: StudyDirectory, found: Mapping[str, MergePlan]) -> None:
    folder = directory.run_dir / PLANS_DIR
    folder.mkdir(exist_ok=True)
    for name, plan in found.items():
        plan.to_yaml(folder / f"{name.replace(' ', '-')}.yaml")


def _results(  # noqa: PLR0913
    study: Study,
    directory: StudyDirectory,
    schedule: Schedule,
    objective: Objective,
    plans: Mapping[str, MergePlan],
    found: set[str],
    models: Models,
) -> Results:
    store, blocks = directory.scores, schedule.blocks["hold_out"]
    own = study.task_experts
    confirmation = confirm(
        {n: {t: store.task_values(p, b) for t, b in blocks.items()} for n, p in plans.items()},
        [name for name in plans if name in found],
        objective,
        own if study.spec.objective != "mean" else {},
        level=study.spec.confirm.level,
        n_resamples=study.spec.confirm.n_resamples,
        seed=study.spec.search.seed,
        aggregates=schedule.aggregates,
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
        study=study.name,
        tasks={task: schedule.metrics[task] for task in study.spec.tasks},
        objective=study.spec.objective,
        rows=rows,
        winner=confirmation.winner,
        verdict=confirmation.verdict,
        plan=plans[confirmation.winner].to_dict(),
        counts=_counts(directory, schedule),
        level=confirmation.level,
        made_of=made_of | versions(study),
        bounds=_bounds(winner, objective, held_out),
        points=_points(directory, schedule, rows, objective),
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


def _points(
    directory: StudyDirectory, schedule: Schedule, rows: Sequence[Row], objective: Objective
) -> list[Point]:
    """Return all that was scored in full as points of several objectives; none of one."""
    if len(objective.names) < 2:
        return []
    full = [one for one in candidates(directory, schedule) if one.is_full]
    front = {one.number for one in front_of(full, objective)}
    scored: list[tuple[str, Mapping[str, float], PointKind]] = [
        (one.name, one.scores, "front" if one.number in front else "trial") for one in full
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
    parts: dict[str, Part] = {"select": "select", "hold-out": "hold_out"}
    for label, part in parts.items():
        blocks = [block for own in schedule.blocks[part].values() for block in own]
        counts[f"{label} examples"] = sum(len(block.examples) for block in blocks)
    counts["search seconds"] = round(directory.elapsed_s)
    return counts


def _save_winner(
    study: Study,
    models: Models,
    results: Results,
    run_dir: Path,
    observer: Observer,
) -> None:
    """Write the winner, unless it is there already."""
    out, plan = run_dir / MODEL_DIR, results.merge_plan
    heads = saved_heads(study, models)
    classes = {expert: head.labels for expert, head in heads.items() if head.model_class}
    overrides = merge_overrides(study.spec)
    card = model_card(results, models.base.name, models.sources, classes, overrides)
    if _is_saved(out, plan, heads):
        (out / "README.md").write_text(card, encoding="utf-8")
        return
    observer.phase("saving the model", None)
    vectors = load_task_vectors(study, models)
    save_merge(models, vectors, plan, out, heads=heads, card=card)


def _is_saved(out: Path, plan: MergePlan, heads: Mapping[str, SavedHead]) -> bool:
    if not all((out / file).is_file() for file in head_files(heads)):
        return False
    try:
        return MergePlan.from_yaml(out / PLAN_FILE) == plan
    except SpecError:
        return False

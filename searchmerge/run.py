"""Running a study from its file to its results."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

from optuna.trial import TrialState

from searchmerge import assemble
from searchmerge.checkpoints.writer import PLAN_FILE
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError, StudyError
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan
from searchmerge.report.card import model_card
from searchmerge.report.results import Results, Row
from searchmerge.search.confirm import confirm
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.objective import Objective
from searchmerge.search.references import expert_name, reference_plans
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
        {task: select[name][task] for task, name in own.items() if name in select}
    )
    runner.run(objective, assemble.make_budget(spec), assemble.make_racing(spec))
    found = top_plans(directory, objective, references, spec.confirm.top_k)
    _write_plans(directory, found)
    plans = {**known, **found}
    confirmed = runner.score_plans("confirmation", plans, "hold_out")
    plans = {name: plan for name, plan in plans.items() if name in confirmed}
    if not any(name in found for name in plans):
        raise StudyError(f"{directory.run_dir}: none of the best candidates could be confirmed")
    return _results(spec, study_file, directory, schedule, plans, set(found), models)


def top_plans(
    directory: StudyDirectory,
    objective: Objective,
    references: Mapping[str, MergePlan],
    top_k: int,
) -> dict[str, MergePlan]:
    """Return the best fully scored trials that are no reference, best first.

    Raises:
        StudyError: If there is none.
    """
    known = {plan.digest for plan in references.values()}
    ranked = sorted(
        (
            t
            for t in directory.trials(TrialState.COMPLETE)
            if t.user_attrs[RESULT]["partial"] is None
        ),
        key=lambda trial: -objective.scalar(trial.user_attrs[RESULT]["scores"]),
    )
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
    plans: Mapping[str, MergePlan],
    found: set[str],
    models: assemble.Models,
) -> Results:
    store, blocks = directory.scores, schedule.blocks["hold_out"]
    objective = assemble.make_objective(spec)
    own = {name: expert_name(task.expert) for name, task in spec.tasks.items() if task.expert}
    confirmation = confirm(
        {n: {t: store.task_values(p, b) for t, b in blocks.items()} for n, p in plans.items()},
        [name for name in plans if name in found],
        objective,
        own if objective.needs_references else {},
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
    )


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

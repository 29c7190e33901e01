"""Running a study from its file to its results."""

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optuna.trial import TrialState

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import SearchMergeError, StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Part
from searchmerge.execution.executor import Executor
from searchmerge.fingerprint import versions
from searchmerge.models import (
    Models,
    check_groups,
    open_models,
    warn_of_doubts,
)
from searchmerge.plan import MergePlan
from searchmerge.report.answers import explained_zero
from searchmerge.report.interim import InterimReport, InterimRow
from searchmerge.report.results import Results
from searchmerge.report.tables import (
    held_out_objective,
    make_bounds,
    make_counts,
    make_details,
    make_points,
    make_rows,
    make_searched,
    told_readings,
    told_sources,
)
from searchmerge.saving import save_results
from searchmerge.search.candidates import candidates
from searchmerge.search.confirm import Bootstrap
from searchmerge.search.directory import StudyDirectory, locked
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.evidence import Evidence
from searchmerge.search.failures import failure_reasons, told_failures
from searchmerge.search.held_out import Compared, HeldOut, Plans
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.pick import Contender, best_on_select
from searchmerge.search.references import BASE
from searchmerge.search.refine import Material
from searchmerge.search.refinements import Refinements, Refining
from searchmerge.search.runner import StudyRunner
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.settling import Settling
from searchmerge.search.storage import storage_errors
from searchmerge.search.trials import (
    TrialRecord,
    best_of,
    by_completion,
    is_refined,
    repeats_of,
)
from searchmerge.study import Study
from searchmerge.watch import Watch
from searchmerge.wording import counted

_logger = logging.getLogger(__name__)
_N_SHOWN = 5  # trials in the report of a study that was stopped


def run_study(
    study: Study,
    config: RunConfig,
    run_dir: Path,
    observer: Observer,
    *,
    search: bool = True,
    retry_failed: bool = False,
) -> Results:
    """Run a study to its end, from wherever an earlier run left it.

    Args:
        study: What is asked for.
        config: On which machine.
        run_dir: Where everything is kept.
        observer: Shows a person what happens.
        search: Whether trials are run; else the best of those there are is confirmed and saved.
        retry_failed: Whether trials that failed in earlier runs are tried again.

    Raises:
        SearchMergeError: If it cannot be run; all that was scored is kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        stack.enter_context(storage_errors(run_dir, config.storage))
        models = open_models(study)
        check_groups(study, models)
        watch = Watch(models)
        warn_of_doubts(models)
        directory = stack.enter_context(
            contextlib.closing(assemble.open_directory(study, watch.content, config, run_dir))
        )
        study.keep(run_dir)
        _note_way_of_merging(directory, assemble.way_of_merging(config))
        if not directory.is_begun:  # a study that was resumed has them already
            directory.enqueue("warm start", assemble.warm_start(study))
        if retry_failed:
            n_failed = directory.enqueue_failed()
            what = counted(n_failed, "failed trial") if n_failed else "no failed trial"
            observer.phase(f"{what} to be tried again", None)
        executor = stack.enter_context(
            contextlib.closing(assemble.make_executor(study, models, config, watch.content))
        )
        results = StudyRun(study, models, directory, executor, observer).run(search=search)
        watch.check()
        save_results(results, study, watch, run_dir, observer, executor)
        return results


class StudyRun:
    """One run of a study: what is done, step by step, from its references to its results.

    Every step takes up what earlier runs have left of it: nothing is scored twice.

    Args:
        study: What is asked for.
        models: Its checkpoints.
        directory: Where its trials and scores are.
        executor: Runs plans.
        observer: Shows a person what happens.
    """

    def __init__(
        self,
        study: Study,
        models: Models,
        directory: StudyDirectory,
        executor: Executor,
        observer: Observer,
    ) -> None:
        self._study = study
        self._models = models
        self._directory = directory
        self._executor = executor
        self._observer = observer
        self._references = assemble.references(study, models)
        self._objective: Objective | None = None  # until the references are scored
        self._stage = "among the references"
        schedule = assemble.make_schedule(study, executor.tasks())
        executor.use(directory.keep_tuning(lambda: executor.tune(schedule.rounds["pilot"][0])))
        self._runner = StudyRunner(
            directory,
            study.space,
            Scoreboard(schedule, directory.scores),
            Dispatcher(executor, directory.scores, directory.run_dir),
            self._references,
            observer,
        )

    def run(self, *, search: bool) -> Results:
        """Score the references, search, confirm the best, and return what came of it.

        A run that does not come to its end leaves a report of what there is.

        Args:
            search: Whether trials are run, or those that there are decide.

        Raises:
            SearchMergeError: If a step cannot be done; all that was scored is kept.
        """
        try:
            return self._to_the_end(search=search)
        except (KeyboardInterrupt, SearchMergeError):
            try:
                self._report_so_far()
            except SearchMergeError as error:
                _logger.warning("no report of what there is: %s", error)
            raise

    def _to_the_end(self, *, search: bool) -> Results:
        refining = assemble.make_refining(self._study, self._models) if search else None
        if refining is not None:  # what cannot be learnt from is refused before all is scored
            self._learnt(refining, self._references)
        references = self._runner.score_references(goes_on=search)
        scores = self._scored_references("select")
        objective = self._objective = self._relative_objective(scores)
        if search:
            self._stage = "during the search"
            self._search(objective)
        if refining is not None:
            self._stage = "while its best plans were refined"
            self._refine(refining, references, objective)
        self._stage = "while its best plans were confirmed"
        best, evidence = self._complete_the_best(references, objective, goes_on=search)
        compared = self._held_out(objective).compare(references, best, evidence)
        winner = compared.confirmation.winner
        self._directory.keep_best(winner, compared.plans[winner])
        return replace(
            self._results(compared, best, objective),
            ended="" if search else self._ended(references, objective),
        )

    def _scored_references(self, part: Part) -> dict[str, dict[str, float]]:
        """Return what those references score that were scored on all of ``part``."""
        board = self._runner.board
        return {
            name: board.scores(plan, part)
            for name, plan in self._references.items()
            if board.is_full(plan, part)
        }

    def _report_so_far(self) -> None:
        """Write the report of a study that is stopped, and the best plan that there is."""
        directory, objective = self._directory, self._objective
        is_past = "select" in self._runner.board.schedule.blocks
        part: Part = "select" if is_past else "pilot"
        if not is_past and directory.is_past_references:
            return  # an earlier run came further, and wrote what there is
        if not (scored := self._scored_references(part)):
            return
        if objective is None:  # which is relative to experts that may not be scored yet
            with contextlib.suppress(StudyError):
                objective = self._relative_objective(scored)
        records = directory.records()
        full: list[TrialRecord] = []
        if objective is not None:
            full = [record for record in candidates(records, objective) if record.is_full]
        leader = self._leader(objective, scored, part)
        if leader is not None:
            directory.keep_best(*leader)
        shown = best_of(by_completion(full), _N_SHOWN)
        shown += [r for r in full if leader and r.name == leader[0] and r not in shown]
        labels = {r.name: ", ".join(filter(None, (r.name, r.kind))) for r in shown}
        rows = scored | {labels[record.name]: dict(record.scores) for record in shown}
        best = labels.get(leader[0], leader[0]) if leader else ""
        violations = objective.violations(rows[best]) if objective and best else {}
        InterimReport(
            study=self._study.name,
            stage=self._stage,
            tasks={task: info.metric for task, info in self._tasks().items()},
            objectives=objective.names if objective else (),
            rows=[
                InterimRow(name, its, objective.values(its) if objective else ())
                for name, its in rows.items()
            ],
            best=best,
            plan=leader[1] if leader else None,
            counts=self._counts(records),
            raw=objective.raw if objective else (),
            broken=[name for name, by in violations.items() if by > 0],
            failed=told_failures(failure_reasons(records), len(records)),
        ).save(directory.run_dir)

    def _leader(
        self, objective: Objective | None, scored: Collection[str], part: Part
    ) -> tuple[str, MergePlan] | None:
        """Return the name and the plan with the best evidence; ``None`` before a merge is scored.

        Args:
            objective: What to compare by; ``None`` where that is not known yet.
            scored: The references that were scored on all of ``part``.
            part: ``pilot`` before the references are past.
        """
        if objective is None:
            return None
        if part == "select":
            return self._runner.leader(objective, self._grading_seed)
        board = self._runner.board
        plans = {name: plan for name, plan in self._references.items() if name in scored}
        known = {n: Contender.of(board, plan, objective, part) for n, plan in plans.items()}
        name = best_on_select(known, plans, board.schedule.tasks, objective)
        return None if name is None else (name, plans[name])

    def _ended(self, references: Plans, objective: Objective) -> str:
        """Return where the search ended, if before its budget was used up."""
        said = []
        spending = self._runner.spending(
            objective, assemble.make_budget(self._study), self._grading_seed
        )
        if not spending.is_over:
            said.append(f"the search was stopped after {counted(spending.n_finished, 'trial')}")
        refining = assemble.make_refining(self._study, self._models)
        if refining is not None:
            starts = self._refinements(refining).starts(references, objective)
            if n_left := sum(not is_done for is_done in starts.values()):
                said.append(f"{len(starts) - n_left} of {len(starts)} best plans were refined")
        unscored = self._directory.trials(TrialState.WAITING, TrialState.RUNNING)
        if n_unscored := sum(map(is_refined, unscored)):
            said.append(f"refined plans that were not scored: {n_unscored}")
        if n_due := sum(repeats_of(t) is not None and not is_refined(t) for t in unscored):
            said.append(f"failed trials that were not tried again: {n_due}")
        if not said:
            return ""
        return f"Ended early: {'; '.join(said)}. The same `searchmerge run` goes on from here."

    def _tasks(self) -> dict[str, TaskInfo]:
        """Return what is known of the tasks, in the study's order."""
        tasks = self._runner.board.schedule.tasks
        return {task: tasks[task] for task in self._study.spec.tasks}

    def _counts(self, records: Sequence[TrialRecord]) -> dict[str, float]:
        directory = self._directory
        times = directory.searching.elapsed_s, directory.refining.elapsed_s
        return make_counts(records, self._runner.board.schedule, *times)

    def _relative_objective(self, scores: Mapping[str, Mapping[str, float]]) -> Objective:
        """Return the objective, relative to what the experts and the base score.

        Args:
            scores: Of the references, by name.
        """
        objective, experts = self._study.objective, self._study.task_experts
        if objective.needs_experts:
            assemble.check_own_experts(self._study, set(scores), experts)
        board = self._runner.board
        expert_scores = {
            task: scores[name][task] for task, name in experts.items() if name in scores
        }

        def explain(task: str) -> str:
            plan, info = self._references[experts[task]], board.schedule.tasks[task]
            return explained_zero(board.store.answers(plan, task, "pilot"), info)

        return objective.relative_to(expert_scores, scores.get(BASE, {}), explain)

    def _search(self, objective: Objective) -> None:
        """Run trials until the budget ends."""
        budget, racing = assemble.make_budget(self._study), assemble.make_racing(self._study)
        self._runner.run(objective, budget, racing, self._grading_seed)

    def _learnt(self, refining: Refining, references: Mapping[str, MergePlan]) -> Material:
        """Return what refinements learn from.

        Raises:
            SpecError: If there is nothing, or too little.
        """
        schedule = self._runner.board.schedule
        return assemble.make_material(self._study, refining, schedule, references)

    def _refine(self, refining: Refining, references: Plans, objective: Objective) -> None:
        """Refine the best plans by gradient, and score what comes of it."""
        learnt, racing = self._learnt(refining, references), assemble.make_racing(self._study)
        self._refinements(refining).run(references, objective, learnt, racing, self._grading_seed)

    def _refinements(self, refining: Refining) -> Refinements:
        return Refinements(self._directory, self._runner, self._executor, self._observer, refining)

    @property
    def _grading_seed(self) -> int | None:
        """The seed of how grades are read; ``None`` where a study goes by its metric alone."""
        spec = self._study.spec
        return spec.search.seed if spec.scores == "graded" else None

    def _complete_the_best(
        self, references: Plans, objective: Objective, *, goes_on: bool
    ) -> tuple[Plans, Evidence]:
        """Return the best candidates, scored in full, and what is believed of all plans."""
        racing, seed = assemble.make_racing(self._study), self._grading_seed
        settling = Settling(self._directory, self._runner, self._observer, objective, racing, seed)
        top_k = self._study.spec.confirm.top_k
        return settling.complete_the_best(references, top_k, goes_on=goes_on)

    def _held_out(self, objective: Objective) -> HeldOut:
        """Return what scores plans on held-out examples, and compares them there."""
        confirm, seed = self._study.spec.confirm, self._study.spec.search.seed
        return HeldOut(
            self._directory,
            self._runner,
            objective,
            self._study.task_experts,
            confirm.experts,
            Bootstrap(confirm.level, confirm.n_resamples, seed),
        )

    def _missing(self, plans: Plans) -> dict[str, str]:
        """Return the references and the best candidates that are not compared, and why."""
        failures = self._runner.failures
        names = dict.fromkeys([*self._references, *failures])
        failed = {name: failures.get(name, "") for name in names if name not in plans}
        return failed | assemble.left_out(self._study, self._models)

    def _results(self, compared: Compared, best: Plans, objective: Objective) -> Results:
        """Return all that the report says."""
        plans, tasks, confirmation = compared
        board, records = self._runner.board, self._directory.records()
        rows = make_rows(board, plans, best.keys(), confirmation, tasks)
        [winner] = [row for row in rows if row.name == confirmation.winner]
        whole = [row for row in rows if row.objective]
        detailed = [row.name for row in whole if row is winner or not row.is_candidate]
        held_out, undivided = held_out_objective(objective, rows, self._study.task_experts)
        return Results(
            study=self._study.name,
            tasks={task: info.metric for task, info in self._tasks().items()},
            objective=objective.label,
            rows=rows,
            winner=winner.name,
            verdict=confirmation.verdict,
            plan=plans[winner.name].to_dict(),
            counts=self._counts(records),
            level=confirmation.level,
            made_of={
                **_described(self._models),
                **versions(self._study),
                "merged by": ", then ".join(self._directory.ways_of_merging),
            },
            bounds=make_bounds(winner, objective, held_out),
            details=make_details(board, plans, detailed),
            searched=make_searched(candidates(records, objective)),
            readings=told_readings(board.grader),
            drawn_from=told_sources(board.schedule, self._study.folder),
            breaking=confirmation.breaking,
            raw=objective.raw,
            undivided=undivided,
            missing=self._missing(plans),
            points=make_points(candidates(records, objective), rows, objective),
            failed=told_failures(failure_reasons(records), len(records)),
        )


def _note_way_of_merging(directory: StudyDirectory, way: str) -> None:
    """Keep how merges are computed, and say so where they were computed otherwise before."""
    if (before := directory.ways_of_merging[-1:]) not in ([], [way]):
        _logger.warning(
            "merges are computed by %s, and by %s in earlier runs: they are rounded otherwise, so "
            "that a plan may score a little otherwise than it would have there",
            *(way, before[0]),
        )
    directory.keep_way_of_merging(way)


def _described(models: Models) -> dict[str, str]:
    """Return each model's name as the user wrote it, and its fingerprint."""
    sources = {"base": models.base.name, **models.sources}
    return {name: f"{sources[name]}, {mark}" for name, mark in models.fingerprints().items()}

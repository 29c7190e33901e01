"""The study runner: references first, then what the sampler proposes, until the budget ends."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import optuna
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Part
from searchmerge.plan import MergePlan
from searchmerge.search.contest import Contest
from searchmerge.search.dispatch import MAX_TRIES, Dispatcher, Job, ListSource
from searchmerge.search.objective import Objective
from searchmerge.search.racing import Racing
from searchmerge.search.references import BASE, merges
from searchmerge.search.schedule import Schedule
from searchmerge.search.space import SearchSpace
from searchmerge.search.study import KIND, StudyDirectory

_logger = logging.getLogger(__name__)

RESULT = "result"  # user attribute of a finished trial: scores, seconds, blocks
PLAN = "plan"  # user attribute: the trial's plan
_CUT_OFF = "cut_off"  # user attribute: runs that died over the trial, blocks known at the last
_KEEP_S = 5.0  # how often the time so far is kept
_DECIDING = "deciding"  # user attribute of the study: references that decide the blocks' order
_FIRST_TRIALS = 5  # if as many fail and none has a score, the study stops


@dataclass(frozen=True, slots=True)
class Budget:
    """When a study ends; the first limit that is reached ends it.

    Attributes:
        n_trials: Trials that are finished, failed ones counted; ``None`` for no limit.
        timeout_s: Seconds over all runs of the study; ``None`` for no limit.
        patience: Finished trials since the best one; ``None`` for no limit.
    """

    n_trials: int | None = None
    timeout_s: float | None = None
    patience: int | None = None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A finished trial, for progress lines and reports.

    Attributes:
        number: Optuna's number of the trial.
        value: What it was told: the objective; ``None`` where it failed.
        scores: Task name to score.
        partial: Blocks it was scored on, where it was stopped early, else ``None``.
        is_best: Whether no earlier fully scored trial is better.
        seconds: Time a worker spent on it.
        note: The reason of a failure, or the baseline it is.
    """

    number: int
    value: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    partial: int | None = None
    is_best: bool = False
    seconds: float = 0.0
    note: str = ""


class Observer(Protocol):
    """Shows a person what happens."""

    def phase(self, title: str, total: int | None, done: int = 0) -> None:
        """A phase of ``total`` steps begins, ``done`` of which are behind it."""
        ...

    def step(self, name: str, scores: Mapping[str, float]) -> None:
        """A reference or a candidate for confirmation is scored."""
        ...

    def trial(self, record: TrialRecord) -> None:
        """A trial is finished."""
        ...


class StudyRunner:
    """Runs one study on one executor, from wherever it stands.

    Args:
        directory: The study and its scores.
        space: What to search.
        schedule: What to score candidates on.
        dispatcher: Keeps the workers busy.
        references: Name to plan of what the winner is compared with.
        observer: Shows a person what happens.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        space: SearchSpace,
        schedule: Schedule,
        dispatcher: Dispatcher,
        references: Mapping[str, MergePlan],
        observer: Observer,
    ) -> None:
        self._directory = directory
        self._space = space
        self._schedule = schedule
        self._dispatcher = dispatcher
        self._references = references
        self._observer = observer

    def score_plans(self, title: str, plans: Mapping[str, MergePlan], part: Part) -> set[str]:
        """Score plans on all of ``part``; return the names of those that can be scored."""
        source = _PlansSource(
            [Job(name, plan, self._schedule.rounds[part]) for name, plan in plans.items()],
            report=lambda job: self._observer.step(
                job.name, self._schedule.scores(self._directory.scores, job.plan, part)
            ),
        )
        self._observer.phase(title, len(plans))
        self._dispatcher.run(source)
        return {job.name for job in source.done}

    @property
    def schedule(self) -> Schedule:
        """Return what candidates are scored on; :meth:`score_references` decides its order."""
        return self._schedule

    def score_references(self) -> dict[str, MergePlan]:
        """Score the references and let them decide the order in which trials see examples.

        Returns:
            Name to plan of those that can be scored.
        """
        names = self.score_plans("references", self._references, "survey")
        known = {name: plan for name, plan in self._references.items() if name in names}
        # a reference that failed in an earlier run may be known now: the order stays what it was
        names = self._directory.keep_first(_DECIDING, [name for name in known if name != BASE])
        self._schedule = self._schedule.informed(
            self._directory.scores, list(known.values()), [known[name] for name in names]
        )
        return known

    def run(self, objective: Objective, budget: Budget, racing: Racing | None) -> None:
        """Run trials until the budget ends.

        Args:
            objective: With the own experts' scores put in.
            budget: When to end.
            racing: Stops candidates that will not win; ``None`` scores all in full.

        Raises:
            StudyError: If the first trials all fail.
        """
        for name, plan in self._references.items():
            if (params := self._space.params(plan)) is not None:
                self._directory.enqueue(name, [params])
        contest = Contest(
            self._directory.scores,
            self._schedule,
            objective,
            racing,
            base=self._references.get(BASE),
            pool=merges(self._references),
        )
        source = TrialSource(
            self._directory, self._space, self._schedule, contest, budget, self._observer
        )
        self._observer.phase("search", budget.n_trials, source.n_finished)
        self._directory.begin_run()
        try:
            self._dispatcher.run(source)
        finally:
            source.keep_elapsed()
            self._directory.end_run()


class _PlansSource(ListSource):
    """A list of plans, whose progress is shown."""

    def __init__(self, jobs: Sequence[Job], report: Callable[[Job], None]) -> None:
        super().__init__(jobs)
        self._report = report

    def finished(self, job: Job) -> None:
        super().finished(job)
        self._report(job)


class TrialSource:
    """The trials of a study: those a stopped run left behind, then new ones.

    Args:
        directory: The study and its scores.
        space: What to search.
        schedule: What to score candidates on; trials see its ``select`` part.
        contest: What candidates are compared with, and by what.
        budget: When to ask no more.
        observer: Shows a person what happens.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        space: SearchSpace,
        schedule: Schedule,
        contest: Contest,
        budget: Budget,
        observer: Observer,
    ) -> None:
        self._directory = directory
        self._study = directory.study
        self._space = space
        self._schedule = schedule
        self._contest = contest
        self._objective = contest.objective
        self._budget = budget
        self._observer = observer
        self._start = time.monotonic() - directory.elapsed_s
        self._kept_s = directory.elapsed_s
        self._orphans = [
            optuna.trial.Trial(self._study, trial._trial_id)
            for trial in directory.trials(TrialState.RUNNING)
        ]
        finished = directory.trials(TrialState.COMPLETE, TrialState.FAIL)
        self.n_finished = len(finished)
        self._n_live = 0
        self._n_since_best = 0
        for trial in sorted(finished, key=lambda trial: trial.datetime_complete or trial.number):
            if trial.state == TrialState.COMPLETE:
                plan = MergePlan.from_dict(trial.user_attrs[PLAN])
                is_full = schedule.is_known(directory.scores, plan, "select")
                self._note_best(plan, partial=not is_full)

    def next_job(self) -> Job | None:
        """Return a trial left behind, or a new one while the budget lasts."""
        while self._orphans:
            job = self._job(self._orphans.pop(0))
            if not self._ended_runs(job):
                return job
            self.failed(job, f"{MAX_TRIES} runs ended abruptly while they were at it")
        if self._is_over():
            return None
        return self._job(self._study.ask())

    def goes_on(self, job: Job) -> bool:
        """Return whether the candidate may still win."""
        self._keep_elapsed_at_times()
        return self._contest.goes_on(job.plan)

    def finished(self, job: Job) -> None:
        """Tell the study what the trial scored, in full or by paired estimate."""
        store = self._directory.scores
        partial = None
        if self._schedule.is_known(store, job.plan, "select"):
            scores = self._schedule.scores(store, job.plan, "select")
        else:
            scores, partial = self._contest.estimate(job.plan)
        trial = self._trial(job)
        result = {
            "scores": scores,
            "partial": partial,
            "merge_s": round(job.merge_s, 4),
            "score_s": round(job.score_s, 4),
        }
        trial.set_user_attr(RESULT, result)
        is_best = self._note_best(job.plan, partial=partial is not None)
        for name, violation in self._objective.violations(scores).items():
            trial.set_constraint(name, violation)
        store.flush()
        self._study.tell(trial, self._objective.values(scores))
        self._end(
            TrialRecord(
                trial.number,
                self._objective.scalar(scores),
                scores,
                partial,
                is_best,
                job.merge_s + job.score_s,
                str(trial.user_attrs.get(KIND, "")),
            )
        )

    def failed(self, job: Job, reason: str) -> None:
        """Tell the study that the trial cannot be scored.

        Raises:
            StudyError: If none of the first trials could be scored.
        """
        trial = self._trial(job)
        trial.set_user_attr("failure", reason)
        self._study.tell(trial, state=TrialState.FAIL)
        self._end(TrialRecord(trial.number, None, note=reason))
        if self._contest.is_open and self.n_finished >= _FIRST_TRIALS:
            first = self._directory.trials(TrialState.FAIL)[0].user_attrs["failure"]
            raise StudyError(f"the first {self.n_finished} trials all failed; the first: {first}")

    def keep_elapsed(self) -> None:
        """Keep the time that all runs of the study have taken so far."""
        self._kept_s = self._elapsed()
        self._directory.set_elapsed(self._kept_s)

    def _keep_elapsed_at_times(self) -> None:
        if self._elapsed() - self._kept_s > _KEEP_S:
            self.keep_elapsed()

    def _is_over(self) -> bool:
        limits = self._budget
        asked = self.n_finished + self._n_live
        return (
            (limits.n_trials is not None and asked >= limits.n_trials)
            or (limits.timeout_s is not None and self._elapsed() >= limits.timeout_s)
            or (limits.patience is not None and self._n_since_best >= limits.patience)
        )

    def _ended_runs(self, job: Job) -> bool:
        """Return whether run after run died over this trial, with no block more known of it."""
        if not self._directory.was_cut_off:
            return False
        trial = self._trial(job)
        n_known = len(self._directory.scores.get(job.plan))
        times, known_before = trial.user_attrs.get(_CUT_OFF, (0, n_known))
        times = times + 1 if n_known == known_before else 1
        trial.set_user_attr(_CUT_OFF, (times, n_known))
        return bool(times >= MAX_TRIES)

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _job(self, trial: optuna.Trial) -> Job:
        plan = self._space.suggest(trial)
        trial.set_user_attr(PLAN, plan.to_dict())
        self._n_live += 1
        return Job(f"trial {trial.number}", plan, self._contest.rounds(), payload=trial)

    def _trial(self, job: Job) -> optuna.Trial:
        if not isinstance(job.payload, optuna.Trial):
            raise TypeError(f"{job.name} is no trial of the study")
        return job.payload

    def _end(self, record: TrialRecord) -> None:
        self._n_live -= 1
        self.n_finished += 1
        self._keep_elapsed_at_times()
        _logger.info(
            "trial %d: %s", record.number, record.note if record.value is None else record.value
        )
        self._observer.trial(record)

    def _note_best(self, plan: MergePlan, *, partial: bool) -> bool:
        if not partial and self._contest.enter(plan):
            self._n_since_best = 0
            return True
        self._n_since_best += 1
        return False

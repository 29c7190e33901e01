"""The trials of a study as jobs: those a stopped run left behind, those due, then new ones."""

import logging
from dataclasses import replace
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.budget import Spending
from searchmerge.search.candidates import candidates
from searchmerge.search.crashes import MAX_CUT_OFF
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.dispatch import Job
from searchmerge.search.failures import TRIED_AGAIN
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.space import SearchSpace
from searchmerge.search.trials import (
    TrialRecord,
    begin,
    by_completion,
    count_cut_off,
    refined_plan,
)

_logger = logging.getLogger(__name__)

_FIRST_TRIALS = 5  # if as many fail and none has a score, the study stops


class Begun(NamedTuple):
    """A trial that was begun, and its record before it is told.

    Attributes:
        trial: The trial; to read its attributes copies its plan, so that it is done once.
        record: Its number, its plan, its kind.
    """

    trial: optuna.Trial
    record: TrialRecord


TrialJob = Job[Begun]


class TrialSource:
    """The trials of a study: those a stopped run left behind, those due, then new ones.

    Due whatever is left of the budget are refined ones, and those that try failed ones again:
    they stand in the place of what the budget has counted.

    Refined ones are scored and recorded like the others, and stopped by a collapse alone. But
    they cost nothing of the budget, and no other candidate is compared with them: the examples
    that they are scored on are those that they were learnt from.

    Args:
        directory: The study and its scores.
        space: What to search.
        objective: With the experts' scores put in.
        incumbents: What candidates are compared with; earlier runs' trials enter here.
        spending: Says when to ask no more.
        observer: Shows a person what happens.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        space: SearchSpace,
        objective: Objective,
        incumbents: Incumbents,
        spending: Spending,
        observer: Observer,
    ) -> None:
        self._directory = directory
        self._space = space
        self._objective = objective
        self._incumbents = incumbents
        self._spending = spending
        self._observer = observer
        self._left_running = directory.left_running()
        self._may_be_due = True
        enter_all(directory, objective, incumbents, spending)
        self._written: tuple[str, MergePlan] | None = None
        self._read = incumbents.read
        directory.keep_read(self._read)
        self._write_best()  # a run that was killed may have left an earlier one's

    def next_job(self) -> TrialJob | None:
        """Return a trial left behind, or one that is due, or a new one while the budget lasts."""
        while self._left_running:
            job = self._job(self._left_running.pop(0))
            if not self._is_given_up(job):
                if self._directory.was_cut_off:
                    job.go_on_block_by_block()
                return job
            self.failed(job, f"{MAX_CUT_OFF} runs ended abruptly while they were at it")
        if self._may_be_due:  # none is enqueued while trials are run
            if (due := self._directory.next_due()) is not None:
                return self._job(due)
            self._may_be_due = False
        if self._spending.is_over:
            return None
        return self._job(self._directory.study.ask())

    def goes_on(self, job: TrialJob) -> bool:
        """Return whether the candidate may still win."""
        self._spending.clock.tick()
        return self._incumbents.may_win(job.plan, is_refined=bool(job.subject.record.refines))

    def finished(self, job: TrialJob) -> None:
        """Tell the study what the trial scored, in full or by paired estimate."""
        outcome = self._incumbents.outcome(job.plan)
        trial, record = job.subject
        record = replace(
            record.judged(self._objective, outcome.scores, outcome.estimates),
            se=outcome.se,
            stopped_after=outcome.stopped_after,
            merge_s=job.merge_s,
            score_s=job.score_s,
        )
        record.write(trial)
        is_best = _enter(record, self._incumbents, self._spending)
        self._directory.scores.flush()
        self._directory.study.tell(trial, record.values)
        _logger.info("%s: %s", record.name, record.value)
        self._end(record, is_best=is_best)

    def failed(self, job: TrialJob, reason: str) -> None:
        """Tell the study that the trial cannot be scored.

        Raises:
            StudyError: If none of the first trials could be scored.
        """
        record = replace(job.subject.record, failure=reason)
        record.write(job.subject.trial)
        self._directory.study.tell(job.subject.trial, state=TrialState.FAIL)
        _logger.info("%s: %s", record.name, reason)
        self._end(record, is_best=False)
        if record.refines or self._spending.n_finished < _FIRST_TRIALS:
            return
        records = self._directory.records()
        if all(r.value is None for r in records):
            n_failed = self._spending.n_finished
            raise StudyError(
                f"the first {n_failed} trials all failed; the first: {records[0].failure}; if "
                f"that is mended, {TRIED_AGAIN}"
            )

    def _is_given_up(self, job: TrialJob) -> bool:
        """Return whether run after run died over this trial, with no block more scored of it."""
        if not self._directory.was_cut_off:
            return False
        n_blocks = len(self._directory.scores.get(job.plan))
        return count_cut_off(job.subject.trial, n_blocks) >= MAX_CUT_OFF

    def _job(self, trial: optuna.Trial) -> TrialJob:
        plan = refined_plan(trial)
        if plan is None:
            plan = self._space.suggest(trial)
            begin(trial, plan)
            self._spending.begin()
        record = TrialRecord.of(trial, plan)
        rounds = self._incumbents.rounds()
        return Job(record.name, plan, rounds, Begun(trial, record), is_trial=True)

    def _write_best(self) -> None:
        """Write the plan with the best evidence so far, and how trials are read, unless it is."""
        if self._incumbents.read is not self._read:
            self._read = self._incumbents.read
            self._directory.keep_read(self._read)
        leader = self._incumbents.leader
        if leader is not None and leader != self._written:
            self._written = leader
            self._directory.keep_best(*leader)

    def _end(self, record: TrialRecord, *, is_best: bool) -> None:
        self._write_best()
        if not record.refines:
            self._spending.end()
        self._spending.clock.tick()
        self._observer.trial(record, is_best=is_best)


def enter_all(
    directory: StudyDirectory, objective: Objective, incumbents: Incumbents, spending: Spending
) -> None:
    """Compare later candidates with earlier runs' trials, and count these towards the patience."""
    for record in by_completion(candidates(directory.records(as_told=True), objective)):
        _enter(record, incumbents, spending)


def _enter(record: TrialRecord, incumbents: Incumbents, spending: Spending) -> bool:
    """Let later candidates be compared with this one; return whether it is the best so far.

    What a sampler proposed alone counts towards the patience, and as it was told: what was
    completed after the search lets none go on that had ended.
    """
    if record.refines:
        return False
    is_best = incumbents.enter(record)
    if not record.kind:  # references and warm starts are scored whatever comes of them
        spending.scored(is_best=is_best and not record.is_completed)
    return is_best

"""Keeping every worker busy: jobs from a source, over any executor, past dead workers."""

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from searchmerge.execution.blocks import Round
from searchmerge.execution.executor import Event, Executor, Failed, Finished, Lost, Scored
from searchmerge.interrupts import held_back, let_through
from searchmerge.plan import MergePlan
from searchmerge.search.crashes import LostWorkers
from searchmerge.search.roster import Roster
from searchmerge.search.scores import ScoreStore

_logger = logging.getLogger(__name__)

_WAIT_S = 30.0

T = TypeVar("T")


@dataclass(slots=True)
class Job(Generic[T]):
    """A plan to be scored on some rounds.

    Attributes:
        name: What to call it in lines and tables.
        plan: What to merge.
        rounds: What to score it on, the whole schedule.
        subject: What it is a job of, for its source: a trial, say.
        is_trial: Whether that is a trial.
        merge_s: Seconds spent merging, over all tries.
        score_s: Seconds spent scoring, over all tries.
    """

    name: str
    plan: MergePlan
    rounds: Sequence[Round]
    subject: T
    is_trial: bool = False
    merge_s: float = 0.0
    score_s: float = 0.0

    def go_on_block_by_block(self) -> None:
        """Let every block be kept as it is scored: what cut the job off may do so again."""
        self.rounds = tuple((block,) for blocks in self.rounds for block in blocks)


class JobSource(Protocol[T]):
    """Says what to score next, and learns what came of it."""

    def next_job(self) -> Job[T] | None:
        """Return the next job, or ``None`` where there is none at present."""
        ...

    def goes_on(self, job: Job[T]) -> bool:
        """Return whether ``job``, of which one more round is scored, is worth the next."""
        ...

    def finished(self, job: Job[T]) -> None:
        """Take note that all of a job's rounds are scored, or that it was not worth the rest."""
        ...

    def failed(self, job: Job[T], reason: str) -> None:
        """Take note that a job cannot be scored."""
        ...


@dataclass(slots=True)
class ListSource(Generic[T]):
    """A fixed list of jobs, each scored to its end.

    Attributes:
        jobs: What to score, in this order.
        done: The jobs that were scored.
        failures: Job name to the reason why it could not be scored.
    """

    jobs: Sequence[Job[T]]
    done: list[Job[T]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    _next: int = 0

    def next_job(self) -> Job[T] | None:
        """Return the next of the list."""
        if self._next == len(self.jobs):
            return None
        self._next += 1
        return self.jobs[self._next - 1]

    def goes_on(self, job: Job[T]) -> bool:
        """Score every job to its end."""
        return True

    def finished(self, job: Job[T]) -> None:
        """Add the job to those done."""
        self.done.append(job)

    def failed(self, job: Job[T], reason: str) -> None:
        """Keep the reason."""
        _logger.warning("%s cannot be scored: %s", job.name, reason)
        self.failures[job.name] = reason


class Dispatcher:
    """Runs jobs from a source on an executor, and keeps every score as it arrives.

    A job whose worker is lost goes to another, block by block, so that each try keeps what it
    scores however soon it is cut off. A plan that kills its workers is given up
    (:class:`~searchmerge.search.crashes.LostWorkers`).

    Args:
        executor: Runs the jobs.
        scores: Keeps what they score.
        run_dir: Where is kept what each worker is at; ``None`` to keep nothing of it.
    """

    def __init__(
        self, executor: Executor, scores: ScoreStore, run_dir: Path | None = None
    ) -> None:
        self._executor = executor
        self._roster = Roster(executor, run_dir)
        self._scores = scores
        self._lost = LostWorkers()
        self._numbers = itertools.count(1)

    def run(self, source: JobSource[T]) -> None:
        """Run jobs until the source has no more; interrupted, all that was scored is kept."""
        shift = _Shift(
            self._executor, self._scores, self._roster, self._lost, self._numbers, source
        )
        try:
            with held_back():
                while shift.fill():
                    self._roster.keep()
                    with let_through():
                        event = self._executor.next_event(_WAIT_S)
                    shift.handle(event)
                self._roster.keep(at_once=True)
        finally:
            shift.stop()


@dataclass(slots=True)
class _Shift(Generic[T]):
    """The jobs of one source, while they are run.

    Attributes:
        executor: Runs them.
        scores: Keeps what they score.
        roster: Counts what each worker does.
        lost: Workers that were lost at plans.
        numbers: Numbers for the executor that no job had yet.
        source: Where jobs come from.
    """

    executor: Executor
    scores: ScoreStore
    roster: Roster
    lost: LostWorkers
    numbers: Iterator[int]
    source: JobSource[T]
    _live: dict[int, Job[T]] = field(default_factory=dict)
    _again: deque[Job[T]] = field(default_factory=deque)

    def fill(self) -> bool:
        """Give every free worker a job; return whether there is anything to wait for."""
        while self.executor.n_free:
            job = self._again.popleft() if self._again else self.source.next_job()
            if job is None:
                return bool(self._live)
            if self.lost.is_hopeless(job.plan.digest):
                n_lost = self.lost.n_lost(job.plan.digest)
                self.source.failed(job, f"{n_lost} workers in a row were lost at this plan")
                continue
            if not self._start(job):
                self._finish(job)
        return True

    def handle(self, event: Event | None) -> None:
        """Do what follows from an event."""
        match event:
            case Scored(number, result) if number in self._live:
                job = self._live[number]
                job.merge_s += result.merge_s
                job.score_s += result.score_s
                self.roster.scored(number, result)
                self.scores.put(job.plan, result.scores)
                to_do = self.scores.missing(job.plan, job.rounds)
                if to_do and not self.source.goes_on(job):
                    self.executor.stop(number)
                    self._finish(self._ended(number))
            case Finished(number) if number in self._live:
                self._finish(self._ended(number))
            case Failed(number, reason) if number in self._live:
                self.source.failed(self._ended(number), reason)
            case Lost(number) as lost if number in self._live:
                self._retry(self._ended(number, is_lost=True), lost)

    def stop(self) -> None:
        """Give up what is still run."""
        for number in self._live:
            self.executor.stop(number)

    def _start(self, job: Job[T]) -> bool:
        """Submit what is not scored of the job yet; return ``False`` where all is, or enough."""
        rounds = self.scores.missing(job.plan, job.rounds)
        if not rounds or (len(rounds) < len(job.rounds) and not self.source.goes_on(job)):
            return False
        number = next(self.numbers)
        self.lost.begin()
        self._live[number] = job
        self.executor.submit(number, job.plan, rounds)
        self.roster.began(number)
        return True

    def _ended(self, number: int, *, is_lost: bool = False) -> Job[T]:
        """Return a job that is no longer run."""
        job = self._live.pop(number)
        self.roster.ended(number, is_trial=job.is_trial and not is_lost)
        return job

    def _finish(self, job: Job[T]) -> None:
        self.lost.end(job.plan.digest)
        self.source.finished(job)

    def _retry(self, job: Job[T], lost: Lost) -> None:
        if lost.was_begun:
            job.go_on_block_by_block()
        digest, n_blocks = job.plan.digest, len(self.scores.get(job.plan))
        n_lost = self.lost.lose(digest, n_blocks, blameless=lost.blameless)
        if self.lost.is_hopeless(digest):
            self.source.failed(job, f"{lost.reason} ({n_lost} workers in a row)")
            return
        _logger.warning("%s lost its worker, and is tried again: %s", job.name, lost.reason)
        self._again.append(job)

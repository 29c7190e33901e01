"""Keeping every worker busy: jobs from a source, over any executor, past dead workers."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from searchmerge.execution.blocks import Round
from searchmerge.execution.executor import Executor, Failed, Finished, Lost, Scored
from searchmerge.plan import MergePlan
from searchmerge.search.scores import ScoreStore

_logger = logging.getLogger(__name__)

MAX_TRIES = 3
MAX_DEATHS = 2
MAX_SPARED = 10  # tries of a job that no worker took up, and that do not count
_WAIT_S = 30.0


@dataclass(slots=True)
class Job:
    """A plan to be scored on some rounds.

    Attributes:
        name: What to call it in lines and tables.
        plan: What to merge.
        rounds: What to score it on, the whole schedule.
        payload: Whatever its source wants to find again.
        tries: How often it was given to a worker, but for those that were found dead.
        n_spared: How often its worker was found dead before it took the job up.
        merge_s: Seconds spent merging, over all tries.
        score_s: Seconds spent scoring, over all tries.
    """

    name: str
    plan: MergePlan
    rounds: Sequence[Round]
    payload: object = None
    tries: int = 0
    n_spared: int = 0
    merge_s: float = 0.0
    score_s: float = 0.0


class JobSource(Protocol):
    """Says what to score next, and learns what came of it."""

    def next_job(self) -> Job | None:
        """Return the next job, or ``None`` where there is none at present."""
        ...

    def goes_on(self, job: Job) -> bool:
        """Return whether ``job``, of which one more round is known, is worth the next."""
        ...

    def finished(self, job: Job) -> None:
        """Take note that all of a job's rounds are known, or that it was not worth the rest."""
        ...

    def failed(self, job: Job, reason: str) -> None:
        """Take note that a job cannot be scored."""
        ...


@dataclass(slots=True)
class ListSource:
    """A fixed list of jobs, each scored to its end.

    Attributes:
        jobs: What to score, in this order.
        done: The jobs that were scored.
        failures: Job name to the reason why it could not be scored.
    """

    jobs: Sequence[Job]
    done: list[Job] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    _next: int = 0

    def next_job(self) -> Job | None:
        """Return the next of the list."""
        if self._next == len(self.jobs):
            return None
        self._next += 1
        return self.jobs[self._next - 1]

    def goes_on(self, job: Job) -> bool:
        """Score every job to its end."""
        return True

    def finished(self, job: Job) -> None:
        """Add the job to those done."""
        self.done.append(job)

    def failed(self, job: Job, reason: str) -> None:
        """Keep the reason."""
        _logger.warning("%s cannot be scored: %s", job.name, reason)
        self.failures[job.name] = reason


class Dispatcher:
    """Runs jobs from a source on an executor, and keeps every score as it arrives.

    A job whose worker is lost goes to another, at most ``MAX_TRIES`` times in all, where a worker
    that was dead before it took the job up does not count (``MAX_SPARED`` times); a plan at
    which ``MAX_DEATHS`` workers died, with no block scored in between, is not tried again.
    """

    def __init__(self, executor: Executor, scores: ScoreStore) -> None:
        self._executor = executor
        self._scores = scores
        self._live: dict[int, Job] = {}
        self._again: deque[Job] = deque()
        self._deaths: dict[str, tuple[int, int]] = {}  # plan to deaths, and blocks known then
        self._count = 0

    def run(self, source: JobSource) -> None:
        """Run jobs until the source has no more; interrupted, all that was scored is kept."""
        try:
            while True:
                waiting = self._fill(source)
                if not self._live and not waiting:
                    return
                self._handle(source)
        finally:
            for number in self._live:
                self._executor.stop(number)
            self._live.clear()
            self._again.clear()

    def _fill(self, source: JobSource) -> bool:
        """Give every free worker a job; return whether a job waits for a worker."""
        while self._executor.n_free:
            job = self._again.popleft() if self._again else source.next_job()
            if job is None:
                return False
            if self._n_deaths(job) >= MAX_DEATHS:
                source.failed(job, f"{self._n_deaths(job)} workers died at this plan")
                continue
            if not self._start(source, job):
                source.finished(job)
        return bool(self._again) or not self._live

    def _start(self, source: JobSource, job: Job) -> bool:
        """Submit what is not known of the job yet; return ``False`` where all is, or enough."""
        rounds = self._scores.missing(job.plan, job.rounds)
        if not rounds or (len(rounds) < len(job.rounds) and not source.goes_on(job)):
            return False
        self._count += 1
        job.tries += 1
        self._live[self._count] = job
        self._executor.submit(self._count, job.plan, rounds)
        return True

    def _handle(self, source: JobSource) -> None:
        match self._executor.next_event(_WAIT_S):
            case Scored(number, result) if number in self._live:
                job = self._live[number]
                job.merge_s += result.merge_s
                job.score_s += result.score_s
                self._scores.put(job.plan, result.scores)
                to_do = self._scores.missing(job.plan, job.rounds)
                if to_do and not source.goes_on(job):
                    self._executor.stop(number)
                    del self._live[number]
                    source.finished(job)
            case Finished(number) if number in self._live:
                source.finished(self._live.pop(number))
            case Failed(number, reason) if number in self._live:
                source.failed(self._live.pop(number), reason)
            case Lost(number) as lost if number in self._live:
                self._retry(source, self._live.pop(number), lost)

    def _retry(self, source: JobSource, job: Job, lost: Lost) -> None:
        if not lost.was_begun and job.n_spared < MAX_SPARED:
            job.n_spared += 1
            job.tries -= 1
        if not lost.blameless:
            n_known = len(self._scores.get(job.plan))
            n_deaths, known_then = self._deaths.get(job.plan.digest, (0, n_known))
            n_deaths = n_deaths + 1 if n_known == known_then else 1
            self._deaths[job.plan.digest] = n_deaths, n_known
        if job.tries >= MAX_TRIES or self._n_deaths(job) >= MAX_DEATHS:
            source.failed(job, f"{lost.reason} ({job.tries} tries)")
            return
        _logger.warning("%s lost its worker, and is tried again: %s", job.name, lost.reason)
        self._again.append(job)

    def _n_deaths(self, job: Job) -> int:
        return self._deaths.get(job.plan.digest, (0, 0))[0]
